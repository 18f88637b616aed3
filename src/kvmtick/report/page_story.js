// The story of a tick, in the panel beside its timeline; the same script as page.js.

const NEVER = {
  outstanding: "it had not reached the guest when the trace ended",
  unknown: "whether it reached the guest, the trace cannot tell",
  else: "it never reached the guest",
};

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function row(...cells) {
  const tr = make("tr");
  for (const cell of cells) tr.append(cell instanceof Node ? cell : make("td", cell));
  return tr;
}

/** Put the tick at this position into the panel of its timeline. */
function tell(timeline, i) {
  const { told, ticks } = timeline;
  const { verdict, where, detail } = ticks.kind[i];
  const worst = told.worst[ticks.index[i]];
  const title = make("h4", `Tick ${count(ticks.index[i])} `);
  const badge = make("span", undefined, "badge");
  badge.style.color = colours[verdict];
  badge.append(make("span", where ? `${verdict} at ${where}` : verdict));
  title.append(badge);
  const parts = [title];
  if (detail) parts.push(make("p", detail));
  if (worst && worst.held_up) parts.push(make("p", worst.held_up, "held"));
  parts.push(hopTable(told, ticks, i, worst ? worst.story : []), factList(ticks, i));
  if (worst && worst.story.length) parts.push(eventTable(worst.story));
  timeline.story.replaceChildren(...parts);
  timeline.story.scrollTop = 0;
}

/** Of the steps that it reached: what, how long since it was due, which events can stand for it. */
function stepsOf(told, ticks, i) {
  const { path, vector } = ticks.kind[i];
  const callback = told.source === "pit" ? "pit_timer_fn" : "apic_timer_fn";
  const byPic = (path ?? told.path) === "pic";
  const event = vector === null ? "" : ` with vector 0x${vector.toString(16)}`;
  return [
    ["the hrtimer is due", 0, null],
    [`its callback runs (${callback})`, ticks.fired[i], /^hrtimer_expire_entry$/],
    ["the kvm-pit worker takes it (pit_do_work)", ticks.work[i], /^sched_kthread_work_execute_start$/],
    [byPic ? "the PIC has the request" : "a local APIC has accepted it", ticks.accept[i], /_irq$/],
    [path === "nmi" ? "VM entry with an NMI" : `VM entry${event}`, ticks.inject[i], /inj|eoi|ack/],
    ["the guest's EOI", ticks.eoi[i], /eoi|ack|pio|msr/],
  ].filter(([, at]) => !Number.isNaN(at));
}

function hopTable(told, ticks, i, story) {
  const steps = stepsOf(told, ticks, i);
  const took = steps.map(([, at], n) => (n ? at - steps[n - 1][1] : 0));
  const longest = Math.max(...took);
  const table = make("table", undefined, "hops");
  const head = make("thead");
  head.append(row(...["since due", "took", "", "step"].map((name) => make("th", name))));
  const body = make("tbody");
  steps.forEach(([what, at, events], n) => {
    const bar = make("td", undefined, "share");
    const fill = make("i");
    fill.style.width = `${longest ? (100 * Math.max(0, took[n])) / longest : 0}%`;
    bar.append(fill);
    const step = make("td", what);
    const line = events && story.find((event) => event[0] === at && events.test(event[2]));
    if (line) step.append(make("small", line[1]));
    const tr = row(duration(at), n ? duration(took[n]) : "", bar, step);
    if (steps.length > 2 && longest > 0 && took[n] === longest) tr.className = "longest";
    body.append(tr);
  });
  const { verdict } = ticks.kind[i];
  if (Number.isNaN(ticks.inject[i])) body.append(row("", "", "", NEVER[verdict] ?? NEVER.else));
  table.append(head, body);
  return table;
}

function factList(ticks, i) {
  const { path, vcpu, period } = ticks.kind[i];
  const list = make("dl");
  for (const [name, value] of [
    ["due", `${seconds(ticks.expiry[i])} after the start`],
    ["trace time", traceTime(ticks.expiry[i])],
    ["period", period === null ? "one-shot" : duration(period)],
    ["path", path],
    ["vCPU", vcpu],
  ]) {
    if (value !== null) list.append(make("dt", name), make("dd", value));
  }
  return list;
}

/** As the trace itself writes it; more digits than a number holds. */
function traceTime(ns) {
  const at = BigInt(data.start_ns) + BigInt(ns);
  return `${at / 1000000000n}.${String(at % 1000000000n).padStart(9, "0")} s`;
}

function eventTable(story) {
  const details = make("details");
  details.open = true;
  details.append(make("summary", `the ${count(story.length)} events of its life`));
  const table = make("table", undefined, "events");
  const body = make("tbody");
  for (const [at, thread, event, text, what] of story) {
    const cell = make("td");
    cell.append(make("b", what), make("small", ` ${thread}`), make("code", `${event}: ${text}`));
    body.append(row(duration(at), cell));
  }
  table.append(body);
  details.append(table);
  return details;
}
