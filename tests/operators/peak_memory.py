"""How much PyTorch allocates on the CPU while something runs."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run):
    """Return the most bytes that were allocated at once by `run`, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak
