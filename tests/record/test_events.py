"""Filters: what they follow, and that they stay within what the kernel takes."""

import mmap

from kvmtick.host.tracefs import TICK_EVENTS
from kvmtick.record.events import EVERYTHING, NOTHING, Filters, events_of, first_filters


def texts(
    *,
    entries: bool = False,
    only_some: bool = False,
    threads: tuple[int, ...] = (),
    followed: tuple[int, ...] = (),
    new: tuple[int, ...] = (),
    timers: tuple[int, ...] = (),
) -> dict[str, str]:
    filters = Filters(entries=entries, only_some=only_some)
    return filters.texts(threads=threads, followed=followed, new=new, timers=timers)


def test_which_events() -> None:
    least = events_of(entries=False, sched=False)
    assert set(TICK_EVENTS) < set(least)
    assert set(events_of(entries=True, sched=True)) - set(least) == {
        "kvm:kvm_exit",
        "sched:sched_switch",
        "sched:sched_waking",
    }


def test_nothing_is_known_yet() -> None:
    found = texts()
    assert found["sched:sched_switch"] == found["timer:hrtimer_cancel"] == NOTHING
    assert found["kvm:kvm_pio"] == EVERYTHING
    assert found["kvm:kvm_entry"] == TICK_EVENTS["kvm:kvm_entry"]


def test_threads_are_followed_in_ranges() -> None:
    found = texts(followed=(5, 9, 7, 8))
    assert found["sched:sched_waking"] == "pid == 5 || (pid >= 7 && pid <= 9)"
    assert found["sched:sched_switch"] == (
        "prev_pid == 5 || (prev_pid >= 7 && prev_pid <= 9)"
        " || next_pid == 5 || (next_pid >= 7 && next_pid <= 9)"
    )


def test_the_entries_of_new_threads() -> None:
    found = texts(new=(11,))
    assert found["kvm:kvm_entry"] == f"{TICK_EVENTS['kvm:kvm_entry']} || common_pid == 11"
    assert texts(entries=True)["kvm:kvm_entry"] == EVERYTHING


def test_some_vms_only() -> None:
    found = texts(only_some=True, threads=(4, 5), new=(5,))
    assert found["kvm:kvm_pio"] == found["kvm:kvm_exit"] == "(common_pid >= 4 && common_pid <= 5)"
    assert found["kvm:kvm_msr"] == (
        f"((common_pid >= 4 && common_pid <= 5)) && ({TICK_EVENTS['kvm:kvm_msr']})"
    )
    assert found["kvm:kvm_entry"].endswith("|| common_pid == 5)")


def test_timers() -> None:
    assert texts(timers=(0xFFFF888000001000, 16))["timer:hrtimer_cancel"] == (
        "hrtimer == 0xffff888000001000 || hrtimer == 0x10"
    )


def test_a_filter_stays_within_a_page() -> None:
    many = tuple(range(100_000, 110_000, 3))
    filters = Filters(entries=False, only_some=True)
    found = filters.texts(threads=many, followed=(7, *many), new=many, timers=many)
    assert all(len(text) < mmap.PAGESIZE for text in found.values())
    assert found["kvm:kvm_pio"] == EVERYTHING
    assert found["kvm:kvm_msr"] == TICK_EVENTS["kvm:kvm_msr"]
    assert "prev_pid == 7 " in found["sched:sched_switch"]
    assert 0 < filters.unfollowed < len(many)


def test_a_kernel_without_a_function_of_kvm() -> None:
    """Without an in-kernel PIT (CONFIG_KVM_IOAPIC) only the local APICs' timers are there."""
    found = first_filters(["apic_timer_fn"])
    assert found["timer:hrtimer_start"] == "function.function == apic_timer_fn"
    assert found["sched:sched_kthread_work_queue_work"] == NOTHING
    assert found["kvm:kvm_pio"] == ""
    assert first_filters(["pit_timer_fn", "apic_timer_fn", "pit_do_work"]) == TICK_EVENTS
