// The timelines of the page: what is drawn on the canvases, and what can be done there. page_story.js
// tells of the tick that is chosen; both are one script.
// Text is only ever set as text, never as markup: names of VMs and threads come from the trace.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const colours = data.colours;
const verdicts = Object.keys(colours);
const ARRIVING = ["delivered", "late", "reinjected"];
const LEFT = 84, RIGHT = 14, PLOT_HEIGHT = 250, LANE = 20, AXIS = 34, STRIP = 22, REACH = 14;
/** Above the plot is room for phases where there are any. */
const TOP = data.sources.some((told) => told.phases.length) ? 34 : 12, PHASE = 18;
const DENSE = 4000, SPARSE = 400;
const SHORTEST_NS = 1000;

const count = (n) => n.toLocaleString("en-US");

function duration(ns) {
  for (const [unit, scale] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]]) {
    if (Math.abs(ns) >= scale) return `${Number((ns / scale).toPrecision(4))} ${unit}`;
  }
  return `${ns} ns`;
}

const seconds = (ns, digits = 9) => `${(ns / 1e9).toFixed(digits)} s`;

/** The ticks of a source, a column each; times are offsets to the expiry, NaN where there is none. */
function decode(told) {
  const sums = (steps) => {
    let sum = 0;
    return Float64Array.from(steps, (step) => (sum += step));
  };
  const offsets = (column) => Float64Array.from(column, (value) => value ?? NaN);
  const ticks = { length: told.index.length, index: sums(told.index), expiry: sums(told.expiry) };
  for (const step of ["fired", "work", "accept", "inject", "eoi"]) ticks[step] = offsets(told[step]);
  // ticks that were left out make a gap, not an interval
  ticks.interval = ticks.expiry.map((at, i) =>
    i && ticks.index[i] - ticks.index[i - 1] === 1 ? at - ticks.expiry[i - 1] : NaN);
  ticks.kind = told.kind.map((kind) => told.kinds[kind]);
  return ticks;
}

/** Marks that tell verdicts apart without colour, too. */
function mark(pen, verdict, x, y, r) {
  if (verdict === "late") {
    pen.beginPath();
    pen.moveTo(x, y - r - 1);
    pen.lineTo(x + r + 1, y + r);
    pen.lineTo(x - r - 1, y + r);
    pen.fill();
  } else if (verdict === "reinjected") {
    pen.beginPath();
    pen.moveTo(x, y - r - 1);
    pen.lineTo(x + r + 1, y);
    pen.lineTo(x, y + r + 1);
    pen.lineTo(x - r - 1, y);
    pen.fill();
  } else if (verdict === "delivered" && r >= 2) {
    pen.beginPath();
    pen.arc(x, y, r, 0, 7);
    pen.fill();
  } else {
    pen.fillRect(x - r, y - r, 2 * r, 2 * r);
  }
}

/** The ends of a logarithmic axis, ns. */
function axis(low, high) {
  const from = Math.max(1, low) / 1.4;
  return [from, Math.max(high * 1.6, from * 100)];
}

class Timeline {
  constructor(root, told) {
    this.root = root;
    this.told = told;
    this.ticks = decode(told);
    this.hidden = new Set();
    this.selected = -1;
    this.hovered = -1;
    this.band = null;
    this.until = "inject";
    this.canvas = root.querySelector("canvas");
    this.pen = this.canvas.getContext("2d");
    this.tip = root.querySelector(".tip");
    this.label = root.querySelector(".range");
    this.story = root.querySelector(".story");
    this.from = 0;
    this.to = this.end = Math.max(data.length_ns, SHORTEST_NS);
    this.sort();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    this.resize();
  }

  // Where everything is.

  /** By verdict: the positions of its ticks; lanes for those that never arrived; the y axis. */
  sort() {
    const { ticks } = this;
    this.byVerdict = new Map(verdicts.map((verdict) => [verdict, []]));
    const lanes = new Set();
    let low = Infinity, high = this.told.period ?? 0;
    for (let i = 0; i < ticks.length; i++) {
      const verdict = ticks.kind[i].verdict;
      this.byVerdict.get(verdict).push(i);
      if (Number.isNaN(ticks.inject[i])) lanes.add(verdict);
      else {
        low = Math.min(low, ticks.inject[i]);
        high = Math.max(high, ticks.inject[i], ticks.eoi[i] || 0);
      }
    }
    this.lanes = verdicts.filter((verdict) => lanes.has(verdict));
    this.plot = low === Infinity ? 0 : PLOT_HEIGHT;
    const latencies = axis(low === Infinity ? high / 1000 : low, high);
    const intervals = ticks.interval.filter((ns) => ns > 0);
    const shortest = intervals.reduce((a, b) => Math.min(a, b), Infinity);
    const longest = intervals.reduce((a, b) => Math.max(a, b), 0);
    this.axes = { inject: latencies, eoi: latencies, interval: axis(Math.min(shortest, longest), longest) };
    this.lanesTop = TOP + this.plot + 8;
    this.axisTop = this.lanesTop + this.lanes.length * LANE;
    this.stripTop = this.axisTop + AXIS;
    this.height = this.stripTop + STRIP + 2;
  }

  get low() {
    return this.axes[this.until][0];
  }

  get high() {
    return this.axes[this.until][1];
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.style.height = `${this.height}px`;
    this.width = this.canvas.clientWidth || 600;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.draw();
  }

  x(ns) {
    return LEFT + ((ns - this.from) / (this.to - this.from)) * (this.width - LEFT - RIGHT);
  }

  time(x) {
    return this.from + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (this.to - this.from);
  }

  stripX(ns) {
    return LEFT + (ns / this.end) * (this.width - LEFT - RIGHT);
  }

  yOf(latency) {
    const share = Math.log(Math.max(latency, this.low) / this.low) / Math.log(this.high / this.low);
    return TOP + this.plot * (1 - share);
  }

  /** NaN if it is not known. */
  y(i) {
    const { ticks } = this;
    if (this.until === "interval") return this.yOf(ticks.interval[i]);
    const value = Number.isNaN(ticks[this.until][i]) ? ticks.inject[i] : ticks[this.until][i];
    if (!Number.isNaN(value)) return this.yOf(value);
    return this.lanesTop + (this.lanes.indexOf(ticks.kind[i].verdict) + 0.5) * LANE;
  }

  /** Where the tick of this number is on the canvas; null if it is not drawn now. */
  place(index) {
    const i = this.ticks.index.indexOf(index);
    if (i < 0 || this.hidden.has(this.ticks.kind[i].verdict)) return null;
    const x = this.x(this.ticks.expiry[i]);
    return x < LEFT || x > this.width - RIGHT ? null : { x, y: this.y(i) };
  }

  /** The first of the sorted positions whose tick does not expire before `ns`. */
  first(positions, ns) {
    let low = 0, high = positions.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ticks.expiry[positions[middle]] < ns) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // Drawing.

  schedule() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      this.draw();
    });
  }

  draw() {
    const { pen, width } = this;
    const style = getComputedStyle(this.root);
    this.ink = style.getPropertyValue("--ink");
    this.card = style.getPropertyValue("--card");
    this.muted = style.getPropertyValue("--muted");
    this.grid = style.getPropertyValue("--grid");
    pen.clearRect(0, 0, width, this.height);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    this.drawLatencyAxis();
    this.drawPhases();
    this.drawLanes();
    this.drawTimeAxis();
    this.drawMarks();
    this.drawPeriod();
    this.drawStrip();
    this.drawChosen();
    const shown = [...this.drawn.values()].reduce((a, b) => a + b, 0);
    this.label.textContent =
      `${seconds(this.from, this.digits)} to ${seconds(this.to, this.digits)}: ${count(shown)} ticks`;
  }

  line(x1, y1, x2, y2, colour, dash = []) {
    this.pen.strokeStyle = colour;
    this.pen.setLineDash(dash);
    this.pen.beginPath();
    this.pen.moveTo(x1, y1);
    this.pen.lineTo(x2, y2);
    this.pen.stroke();
    this.pen.setLineDash([]);
  }

  drawLatencyAxis() {
    const { pen, width } = this;
    if (!this.plot) return;
    pen.lineWidth = 1;
    pen.textAlign = "right";
    for (let at = 10 ** Math.ceil(Math.log10(this.low)); at < this.high; at *= 10) {
      const y = Math.round(this.yOf(at)) + 0.5;
      this.line(LEFT, y, width - RIGHT, y, this.grid);
      pen.fillStyle = this.muted;
      pen.fillText(duration(at), LEFT - 8, y);
    }
  }

  /** Where a tick is late, written over the marks. */
  drawPeriod() {
    const { pen } = this;
    const period = this.told.period;
    if (!period || !this.plot) return;
    const y = Math.round(this.yOf(period)) + 0.5;
    const late = this.until === "inject" ? ": late from here on" : "";
    this.line(LEFT, y, this.width - RIGHT, y, this.muted, [5, 4]);
    pen.textAlign = "left";
    pen.strokeStyle = this.card;
    pen.lineWidth = 4;
    pen.strokeText(`one period, ${duration(period)}${late}`, LEFT + 6, y + 10);
    pen.lineWidth = 1;
    pen.fillStyle = this.muted;
    pen.fillText(`one period, ${duration(period)}${late}`, LEFT + 6, y + 10);
  }

  /** How the guest had set the timer: a bar each, with its words where they fit. */
  drawPhases() {
    const { pen, width } = this;
    pen.textAlign = "left";
    this.told.phases.forEach((phase, number) => {
      const from = Math.max(this.x(phase.from), LEFT), to = Math.min(this.x(phase.to), width - RIGHT);
      if (to < LEFT || from > width - RIGHT) return;
      const y = TOP - PHASE - 6;
      pen.fillStyle = this.muted;
      pen.globalAlpha = number % 2 ? 0.25 : 0.45;
      pen.fillRect(from, y, Math.max(to - from, 2), PHASE);
      pen.globalAlpha = 1;
      if (this.x(phase.from) >= LEFT) this.line(from, y, from, this.axisTop, this.muted, [1, 3]);
      if (pen.measureText(phase.text).width > to - from - 10) return;
      pen.fillStyle = this.ink;
      pen.fillText(phase.text, from + 5, y + PHASE / 2 + 1);
    });
  }

  drawLanes() {
    const { pen, width } = this;
    this.lanes.forEach((verdict, lane) => {
      const y = this.lanesTop + lane * LANE;
      pen.fillStyle = this.grid;
      pen.globalAlpha = lane % 2 ? 0.25 : 0.5;
      pen.fillRect(LEFT, y, width - LEFT - RIGHT, LANE);
      pen.globalAlpha = 1;
      pen.fillStyle = this.muted;
      pen.textAlign = "right";
      pen.fillText(verdict, LEFT - 8, y + LANE / 2);
    });
  }

  drawTimeAxis() {
    const { pen } = this;
    const rough = ((this.to - this.from) * 110) / (this.width - LEFT - RIGHT);
    const decade = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * decade).find((n) => n >= rough);
    this.digits = Math.min(9, Math.max(0, 9 - Math.floor(Math.log10(step) + 1e-9)));
    pen.textAlign = "center";
    for (let at = Math.ceil(this.from / step) * step; at <= this.to; at += step) {
      const x = Math.round(this.x(at)) + 0.5;
      this.line(x, TOP, x, this.axisTop + 4, this.grid);
      pen.fillStyle = this.muted;
      pen.fillText(seconds(at, this.digits), x, this.axisTop + 15);
    }
    this.digits = Math.min(9, this.digits + 1);
  }

  /** Many ticks share a pixel; one mark of a verdict is enough there. */
  drawMarks() {
    const { pen, ticks, width } = this;
    this.drawn = new Map();
    const views = verdicts.map((verdict) => {
      const positions = this.byVerdict.get(verdict);
      const view = [this.first(positions, this.from), this.first(positions, this.to + 1)];
      return [verdict, positions, ...view];
    });
    const total = views.reduce((sum, [, , first, end]) => sum + end - first, 0);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT - 5, 0, width - LEFT - RIGHT + 10, this.axisTop);
    pen.clip();
    const columns = Math.ceil(width) + 1;
    for (const [verdict, positions, first, end] of views) {
      if (this.hidden.has(verdict)) continue;
      this.drawn.set(verdict, end - first);
      const taken = new Uint8Array(columns * (Math.ceil(this.height) + 1));
      const common = verdict === "delivered" && total > DENSE;
      const radius = total < SPARSE ? 3.5 : verdict === "delivered" ? (common ? 1 : 2) : 3;
      pen.fillStyle = colours[verdict];
      pen.globalAlpha = common ? 0.75 : 1;
      for (let at = first; at < end; at++) {
        const i = positions[at];
        const x = this.x(ticks.expiry[i]), y = this.y(i);
        if (Number.isNaN(y)) continue;
        const pixel = Math.round(y) * columns + Math.round(x);
        if (taken[pixel]) continue;
        taken[pixel] = 1;
        mark(pen, verdict, x, y, radius);
      }
    }
    pen.restore();
  }

  /** The whole trace: where ticks did not simply come, and what part of it is shown above. */
  drawStrip() {
    const { pen, ticks } = this;
    const y = this.stripTop, right = this.width - RIGHT;
    pen.fillStyle = this.grid;
    pen.globalAlpha = 0.5;
    pen.fillRect(LEFT, y, right - LEFT, STRIP);
    pen.globalAlpha = 1;
    for (const verdict of verdicts) {
      if (verdict === "delivered" || this.hidden.has(verdict)) continue;
      pen.fillStyle = colours[verdict];
      let last = -1;
      for (const i of this.byVerdict.get(verdict)) {
        const x = Math.round(this.stripX(ticks.expiry[i]));
        if (x !== last) pen.fillRect((last = x) - 0.5, y + 3, 1.5, STRIP - 6);
      }
    }
    const from = this.stripX(this.from), to = Math.max(this.stripX(this.to), from + 3);
    pen.strokeStyle = this.ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(from, y, to - from, STRIP);
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.fillStyle = this.muted;
    pen.fillText("all", LEFT - 8, y + STRIP / 2);
  }

  drawChosen() {
    const { pen, ticks } = this;
    if (this.band) {
      const [a, b] = this.band;
      pen.fillStyle = this.ink;
      pen.globalAlpha = 0.12;
      pen.fillRect(Math.min(a, b), TOP, Math.abs(b - a), this.axisTop - TOP);
      pen.globalAlpha = 1;
    }
    for (const i of [this.hovered, this.selected]) {
      if (i < 0 || this.hidden.has(ticks.kind[i].verdict)) continue;
      const x = this.x(ticks.expiry[i]);
      if (x < LEFT - 1 || x > this.width - RIGHT + 1) continue;
      if (i === this.selected) this.line(x, TOP, x, this.axisTop, this.muted, [2, 3]);
      pen.strokeStyle = this.ink;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x, this.y(i), 7, 0, 7);
      pen.stroke();
      pen.lineWidth = 1;
    }
  }

  // What the user does.

  zoom(from, to) {
    const length = Math.min(Math.max(to - from, SHORTEST_NS), this.end);
    this.from = Math.min(Math.max(from, 0), this.end - length);
    this.to = this.from + length;
    this.schedule();
  }

  zoomBy(factor, around = (this.from + this.to) / 2) {
    this.zoom(around - (around - this.from) * factor, around + (this.to - around) * factor);
  }

  pan(share) {
    const by = (this.to - this.from) * share;
    this.zoom(this.from + by, this.to + by);
  }

  reset() {
    this.zoom(0, this.end);
  }

  show(verdict, visible) {
    if (visible) this.hidden.delete(verdict);
    else this.hidden.add(verdict);
    this.schedule();
  }

  /** The position of the tick whose mark is nearest; -1 if none is within reach. */
  nearest(x, y) {
    let best = -1, least = REACH * REACH;
    for (const [verdict, positions] of this.byVerdict) {
      if (this.hidden.has(verdict)) continue;
      const end = this.first(positions, this.time(x + REACH));
      for (let at = this.first(positions, this.time(x - REACH)); at < end; at++) {
        const i = positions[at];
        const away = (this.x(this.ticks.expiry[i]) - x) ** 2 + (this.y(i) - y) ** 2;
        if (away <= least) [best, least] = [i, away];
      }
    }
    return best;
  }

  choose(i) {
    this.selected = i;
    tell(this, i);
    const at = this.ticks.expiry[i];
    if (at < this.from || at > this.to) {
      const half = (this.to - this.from) / 2;
      this.zoom(at - half, at + half);
    }
    this.schedule();
  }

  /** Show the tick of this number, with its neighbours. */
  jump(index) {
    const i = this.ticks.index.indexOf(index);
    if (i < 0) return;
    const { verdict } = this.ticks.kind[i];
    if (this.hidden.has(verdict)) this.root.querySelector(`[data-verdict="${verdict}"]`).click();
    const half = 12 * (this.told.period ?? this.end / 200);
    this.zoom(this.ticks.expiry[i] - half, this.ticks.expiry[i] + half);
    this.choose(i);
    this.canvas.scrollIntoView({ block: "nearest" });
  }

  /** The next tick, or the one before, of those that are not filtered out. */
  step(by) {
    const { ticks } = this;
    let i = this.selected;
    if (i < 0) {
      i = 0;
      while (i < ticks.length && ticks.expiry[i] < this.from) i++;
      i -= by;
    }
    do i += by;
    while (i >= 0 && i < ticks.length && this.hidden.has(ticks.kind[i].verdict));
    if (i >= 0 && i < ticks.length) this.choose(i);
  }

  listen() {
    const { canvas, root } = this;
    const where = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      const [x, y] = where(event);
      drag = { x, strip: y >= this.stripTop, pan: event.shiftKey, from: this.from, to: this.to };
      canvas.setPointerCapture(event.pointerId);
      if (drag.strip) this.centre(x);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = where(event);
      if (!drag) return this.hover(x, y);
      if (drag.strip) return this.centre(x);
      if (drag.pan) {
        const by = ((drag.x - x) / (this.width - LEFT - RIGHT)) * (drag.to - drag.from);
        return this.zoom(drag.from + by, drag.to + by);
      }
      this.band = Math.abs(x - drag.x) > 4 ? [drag.x, x].map((at) => this.within(at)) : null;
      this.schedule();
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!drag) return;
      const [x, y] = where(event);
      if (this.band) this.zoom(...this.band.map((at) => this.time(at)).sort((a, b) => a - b));
      else if (!drag.strip && Math.abs(x - drag.x) <= 4) {
        const i = this.nearest(x, y);
        if (i >= 0) this.choose(i);
      }
      this.band = drag = null;
      this.schedule();
    });
    canvas.addEventListener("pointercancel", () => (this.band = drag = null));
    canvas.addEventListener("pointerleave", () => this.hover(-99, -99));
    canvas.addEventListener("dblclick", () => this.reset());
    canvas.addEventListener("wheel", (event) => this.wheel(event, where(event)[0]), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const [name, act] of [
      ["in", () => this.zoomBy(0.5)],
      ["out", () => this.zoomBy(2)],
      ["left", () => this.pan(-0.5)],
      ["right", () => this.pan(0.5)],
      ["reset", () => this.reset()],
    ]) root.querySelector(`button.${name}`).addEventListener("click", act);
    if (!this.plot) root.querySelector('option[value="interval"]').remove();
    root.querySelector("select").addEventListener("change", (event) => {
      this.until = event.target.value;
      this.schedule();
    });
    for (const button of root.querySelectorAll("button[data-verdict]")) {
      button.addEventListener("click", () => {
        const visible = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(visible));
        this.show(button.dataset.verdict, visible);
      });
    }
    for (const button of root.querySelectorAll("button[data-tick]")) {
      button.addEventListener("click", () => this.jump(Number(button.dataset.tick)));
    }
  }

  within(x) {
    return Math.min(Math.max(x, LEFT), this.width - RIGHT);
  }

  centre(x) {
    const at = ((this.within(x) - LEFT) / (this.width - LEFT - RIGHT)) * this.end;
    const half = (this.to - this.from) / 2;
    this.zoom(at - half, at + half);
  }

  /** With Ctrl it zooms; sideways it pans; else the page scrolls. */
  wheel(event, x) {
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    if (event.ctrlKey || event.metaKey) this.zoomBy(event.deltaY > 0 ? 1.25 : 0.8, this.time(x));
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.pan(sideways / 800);
    else return;
    event.preventDefault();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const around = this.selected < 0 ? undefined : this.ticks.expiry[this.selected];
    const act = {
      ArrowLeft: () => (event.shiftKey ? this.pan(-0.2) : this.step(-1)),
      ArrowRight: () => (event.shiftKey ? this.pan(0.2) : this.step(1)),
      "+": () => this.zoomBy(0.5, around),
      "=": () => this.zoomBy(0.5, around),
      "-": () => this.zoomBy(2, around),
      0: () => this.reset(),
      Home: () => this.reset(),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  hover(x, y) {
    const i = y < this.axisTop ? this.nearest(x, y) : -1;
    if (i === this.hovered) return;
    this.hovered = i;
    this.tip.hidden = i < 0;
    this.canvas.style.cursor = i < 0 ? "crosshair" : "pointer";
    if (i >= 0) {
      const { index, kind, inject, eoi, interval } = this.ticks;
      const took = Number.isNaN(inject[i]) ? "" : `, ${duration(inject[i])} to VM entry`;
      const since = Number.isNaN(interval[i]) ? "" : `, ${duration(interval[i])} after the one before`;
      const ended = Number.isNaN(eoi[i]) ? "" : `, ${duration(eoi[i])} to EOI`;
      this.tip.textContent = `tick ${count(index[i])}: ${kind[i].verdict}${took}${ended}${since}`;
      const at = this.x(this.ticks.expiry[i]);
      const left = at < this.width / 2 ? at + 12 : at - 12 - this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, left)}px`;
      this.tip.style.top = `${Math.max(0, this.y(i) - 30)}px`;
    }
    this.schedule();
  }
}

const timelines = data.sources.map((told) => new Timeline(document.getElementById(told.id), told));
const drawAll = () => timelines.forEach((timeline) => timeline.draw());
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", drawAll);
}
for (const button of document.querySelectorAll("button[data-of]")) {
  const timeline = timelines[data.sources.findIndex(({ id }) => id === button.dataset.of)];
  button.addEventListener("click", () => {
    const { from, to } = button.dataset;
    const margin = (to - from) / 20;
    timeline.zoom(from - margin, Number(to) + margin);
    timeline.canvas.scrollIntoView({ block: "center" });
  });
}
window.kvmtick = { timelines };
document.documentElement.classList.add("drawn");
