"""The story of one tick: its steps, what they changed, and that it speaks of things that exist."""

import importlib

import pytest
from apic_stream import APIC_TIMER, ApicStream

from kvmtick import guests
from kvmtick.kvm.model import ModelVm
from kvmtick.ticks import story
from kvmtick.ticks.story import Step, StoryTeller
from kvmtick.ticks.verdict import Path, Verdict, Where
from kvmtick.trace.events import TRACEPOINTS


def tell(
    guest: str, index: int, *, ticks: int, reinject: bool = True, param_ms: int = 50
) -> StoryTeller:
    """Run a built-in guest and follow one of its ticks."""
    with ModelVm(detail=True) as vm:
        teller = StoryTeller(index, vm.machine.recorder, vm.machine.snapshot)
        image = guests.load(guest, ticks=ticks, param_ms=param_ms)
        vm.prepare(image.needs, reinject)
        vm.load(image)
        run = vm.run()
        assert run.exit.reason == "done"
        assert run.ticks is not None
        if teller.tick is not None:
            same = run.ticks[index]
            assert (same.verdict, same.where) == (teller.tick.verdict, teller.tick.where)
        return teller


def events(teller: StoryTeller) -> list[str]:
    return [step.event.partition(":")[0] for step in teller.steps()]


def changes(steps: list[Step], event: str) -> list[str]:
    return [c for step in steps if step.event.startswith(f"{event}:") for c in step.changed]


def in_order(wanted: list[str], told: list[str]) -> bool:
    """`wanted` is a subsequence of `told`."""
    rest = iter(told)
    return all(event in rest for event in wanted)


def test_a_delivered_tick_is_told_from_the_arming_to_the_eoi() -> None:
    teller = tell("tick-pic", 3, ticks=5)
    assert teller.tick is not None
    assert teller.tick.verdict is Verdict.DELIVERED
    steps = teller.steps()
    assert in_order(
        [
            "hrtimer_start",
            "hrtimer_expire_entry",
            "sched_kthread_work_queue_work",
            "sched_kthread_work_execute_start",
            "kvm_set_irq",
            "kvm_pic_set_irq",
            "sched_kthread_work_execute_end",
            "kvm_vcpu_wakeup",
            "kvm_inj_virq",
            "kvm_entry",
            "kvm_pio",
            "kvm_ack_irq",
        ],
        events(teller),
    )
    assert "pending: 0 -> 1" in changes(steps, "hrtimer_expire_entry")
    assert "irq_ack: 1 -> 0" in changes(steps, "sched_kthread_work_execute_start")
    assert "PIC IRR: 00000000 -> 00000001" in changes(steps, "kvm_pic_set_irq")
    assert "vCPU: halted -> runnable" in changes(steps, "kvm_vcpu_wakeup")
    assert "VM-entry intr info: 0x00000000 -> 0x80000020" in changes(steps, "kvm_inj_virq")
    assert "PIC ISR: 00000001 -> 00000000" in changes(steps, "kvm_pio")
    assert "pending: 1 -> 0" in changes(steps, "kvm_ack_irq")
    assert [step.ts_ns for step in steps] == sorted(step.ts_ns for step in steps)


def test_a_reinjected_tick_shows_the_refusal_and_the_acknowledgement_that_freed_it() -> None:
    teller = tell("tick-if0", 10, ticks=18, param_ms=10)
    assert teller.tick is not None
    assert teller.tick.verdict is Verdict.REINJECTED
    told = events(teller)
    refused = told.index("sched_kthread_work_execute_end")
    assert "kvm_set_irq" not in told[:refused], "the worker's first run gave no pulse"
    assert in_order(
        ["kvm_ack_irq", "sched_kthread_work_queue_work", "kvm_set_irq", "kvm_inj_virq"],
        told[refused:],
    )
    assert told[-1] == "kvm_ack_irq"
    assert any(step.skipped for step in teller.steps()), "other ticks come in between"


def test_a_coalesced_tick_ends_in_the_pic() -> None:
    teller = tell("tick-if0", 10, ticks=18, reinject=False, param_ms=10)
    assert teller.tick is not None
    assert (teller.tick.verdict, teller.tick.where) == (Verdict.COALESCED, Where.PIC)
    steps = teller.steps()
    assert any("(coalesced)" in step.event for step in steps)
    assert "kvm_inj_virq" not in events(teller)


def test_a_dropped_tick_ends_with_what_threw_its_count_away() -> None:
    teller = tell("tick-mask", 10, ticks=20, param_ms=10)
    assert teller.tick is not None
    assert teller.tick.verdict is Verdict.DROPPED
    assert events(teller)[-2:] == ["kvm_pio", "kvm_pit_reset_reinject"]
    assert "val 0xfe" in teller.steps()[-2].event, "the guest unmasked IRQ 0"
    assert any(c.startswith("pending: ") and c.endswith("-> 0") for c in teller.steps()[-1].changed)


def test_a_one_shot_tick_is_armed_by_the_guest() -> None:
    teller = tell("tick-oneshot", 2, ticks=3)
    assert teller.tick is not None
    assert teller.tick.verdict is Verdict.DELIVERED
    assert events(teller)[0] == "hrtimer_start"
    assert "hrtimer_start" not in events(teller)[1:], "nobody armed it again meanwhile"


APIC_END = ["kvm_inj_virq", "kvm_entry", "kvm_apic", "kvm_eoi"]


@pytest.mark.parametrize(
    ("guest", "path", "told", "what_changed"),
    [
        (
            "tick-ioapic",
            Path.IOAPIC,
            [
                *("sched_kthread_work_execute_start", "kvm_set_irq", "kvm_apic_accept_irq"),
                *("kvm_ioapic_set_irq", *APIC_END, "kvm_ack_irq"),
            ],
            {
                "kvm_apic_accept_irq": "LAPIC IRR: none -> 0x40",
                "kvm_inj_virq": "LAPIC ISR: none -> 0x40",
                "kvm_eoi": "LAPIC ISR: 0x40 -> none",
                "kvm_ack_irq": "irq_ack: 0 -> 1",
            },
        ),
        (
            "tick-msi",
            Path.MSI,
            ["kvm_set_irq", "kvm_msi_set_irq", "kvm_apic_accept_irq", *APIC_END],
            {"kvm_apic_accept_irq": "LAPIC IRR: none -> 0x43"},
        ),
        (
            "tick-lapic",
            Path.LAPIC,
            ["hrtimer_expire_entry", "hrtimer_start", "kvm_apic_accept_irq", *APIC_END],
            {
                "hrtimer_expire_entry": "LAPIC timer pending: 0 -> 1",
                "kvm_apic_accept_irq": "LAPIC timer pending: 1 -> 0",
                "kvm_eoi": "LAPIC ISR: 0x41 -> none",
            },
        ),
        (
            "tick-x2apic",
            Path.LAPIC,
            ["hrtimer_start", "hrtimer_expire_entry", "kvm_apic_accept_irq", *APIC_END],
            {"kvm_inj_virq": "VM-entry intr info: 0x00000000 -> 0x80000041"},
        ),
        (
            "nmi-watchdog",
            Path.NMI,
            [
                *("kvm_pic_set_irq", "kvm_apic_accept_irq", "sched_kthread_work_execute_end"),
                *("kvm_inj_nmi", "kvm_entry"),
            ],
            {
                "kvm_apic_accept_irq": "NMI pending: 0 -> 1",
                "kvm_inj_nmi": "NMI pending: 1 -> 0",
            },
        ),
    ],
)
def test_a_tick_by_way_of_the_local_apic_is_told_to_its_end(
    guest: str, path: Path, told: list[str], what_changed: dict[str, str]
) -> None:
    teller = tell(guest, 3, ticks=5)
    assert teller.tick is not None
    assert (teller.tick.verdict, teller.tick.path) == (Verdict.DELIVERED, path)
    assert in_order(told, events(teller)), events(teller)
    assert events(teller)[-1] == told[-1]
    for event, change in what_changed.items():
        assert change in changes(teller.steps(), event)
    expiry = next(s for s in teller.steps() if s.event.startswith("hrtimer_expire_entry"))
    lapic = path is Path.LAPIC
    assert (expiry.kernel, expiry.module.rpartition(".")[2]) == (
        "apic_timer_fn" if lapic else "pit_timer_fn",
        "timer_fn",
    )


def test_with_several_vcpus_their_names_are_told() -> None:
    teller = tell("ipi-tick", 3, ticks=5)
    assert teller.tick is not None
    assert teller.tick.vcpu == 0
    told = changes(teller.steps(), "kvm_vcpu_wakeup")
    assert "vCPU 0 state: halted -> runnable" in told


def test_a_tick_that_its_vcpu_did_not_look_at_in_time_is_told_as_coalesced() -> None:
    with ModelVm(detail=True, seed=1) as vm:
        tellers = StoryTeller(2, vm.machine.recorder, vm.machine.snapshot)
        vm.machine.host.set_fault("vcpu_off", "3500us")
        image = guests.load("tick-lapic", ticks=3)
        vm.prepare(image.needs)
        vm.load(image)
        vm.run()
        assert tellers.tick is not None
        assert (tellers.tick.verdict, tellers.tick.where) == (Verdict.COALESCED, Where.LAPIC)
        assert "kvm_inj_virq" not in events(tellers)
        assert "merged" in tellers.text()


def test_the_story_is_the_main_sources_whoever_came_first() -> None:
    """Two timers and a PIT, all with a tick 2; which is the main one shows at the end."""
    s = ApicStream(vcpus=2)
    teller = StoryTeller(2, s.recorder, dict)
    s.arm(vcpu=0)
    s.arm(vcpu=1)
    for vcpu in (1, 1, 0, 0, 0):
        s.fire(vcpu)
    assert teller.expired == 3
    assert teller.tick is not None
    assert "apic_timer_fn" in teller.text()
    assert f"hrtimer={APIC_TIMER:016x}" in teller.text()
    s.program(10)
    for _ in range(3):
        s.expire()
    assert "apic_timer_fn" not in teller.text(), "as many of the PIT's as of the timer's"
    assert teller.tick is not None
    assert "pit_timer_fn" in teller.text()


def test_the_text_and_the_dict_tell_the_same_steps() -> None:
    teller = tell("tick-pic", 1, ticks=2)
    text, told = teller.text(), teller.as_dict()
    assert text.startswith("the life of tick 1: delivered\n")
    assert isinstance(told["steps"], list)
    assert len(told["steps"]) == len(teller.steps())
    for step in told["steps"]:
        assert step["event"] in text
        assert step["module"] in text
        assert step["kernel"] in text
    assert (told["tick"], told["verdict"], told["where"]) == (1, "delivered", None)
    assert "1 events of" not in text


def test_a_tick_that_did_not_happen_is_said_to_be_one() -> None:
    teller = tell("tick-pic", 9, ticks=3)
    assert teller.tick is None
    assert teller.text() == "tick 9 did not happen: 3 expired in this run"
    assert teller.steps() == []
    assert teller.as_dict()["verdict"] is None


@pytest.mark.parametrize("words", [*story._TOLD.values(), *story._TIMER_FN.values()])
def test_every_event_can_be_told_and_names_code_that_exists(words: story.Words) -> None:
    assert set(story._TOLD) == set(TRACEPOINTS)
    what, kernel, module = words
    assert what
    assert kernel
    parts = f"kvmtick.{module}".split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            found = getattr(found, name)
        return
    pytest.fail(f"no module in {module}")
