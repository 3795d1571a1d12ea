"""A plan as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimum_fista.run.planning.plan import PruningPlan

_WIDTH = 44


def plan_text(plan: PruningPlan) -> str:
    """All of a plan, in tables."""
    return "\n".join(_lines(plan))


def _lines(plan: PruningPlan) -> Iterator[str]:
    model, settings = plan.model, plan.settings
    held_out = f" ({settings['held_out']} sequences held out)" if settings["held_out"] else ""
    yield (
        f"{model['class']}: {model['num_parameters']:,} parameters in {model['dtype']} ({size(model['bytes'])}), "
        f"{model['decoder_layers']} decoder layers"
    )
    yield (
        f"{plan.config['method']}, error correction {plan.config['error_correction']}, "
        f"{settings['num_samples']} x {settings['sequence_length']} calibration tokens{held_out}, "
        f"batches of {settings['batch_size']}, on {settings['device']}"
    )
    yield ""
    yield f"{'operators':<24}{'number':>8}{'weights':>20}{'zeros':>20}"
    for name, group in plan.groups.items():
        yield f"{name:<24}{group.operators:>8}{group.parameters:>20,}{group.zeros:>20,}"
    pruned, zeros = (sum(getattr(g, key) for g in plan.groups.values()) for key in ("parameters", "zeros"))
    yield f"{'together':<24}{sum(g.operators for g in plan.groups.values()):>8}{pruned:>20,}{zeros:>20,}"
    yield f"{'everything else, dense':<32}{plan.other_parameters:>20,}{0:>20,}"
    for reason, count in Counter(plan.left_dense.values()).items():
        names = [name for name, why in plan.left_dense.items() if why == reason]
        more = f" and {count - 3} more" if count > 3 else ""
        yield f"left dense ({reason}): {', '.join(names[:3])}{more}"
    for place, peak in plan.peaks.items():
        yield ""
        yield f"{f'peak memory, {place}: {peak.moment}':<{_WIDTH}}{size(peak.total):>12}"
        for name, held in sorted(peak.parts.items(), key=lambda part: -part[1]):
            yield f"  {name:<{_WIDTH - 2}}{size(held):>12}"
    yield ""
    yield f"{'disk':<{_WIDTH}}{size(sum(plan.disk_bytes.values())):>12}"
    for name, held in plan.disk_bytes.items():
        if not held:
            continue
        yield f"  {name:<{_WIDTH - 2}}{size(held):>12}"
    yield ""
    seconds = plan.seconds
    yield f"{'products and time':<{_WIDTH}}{plan.products / 1e12:>12,.2f} TFLOP" + (
        f"{duration(sum(seconds.values())):>12}" if seconds else ""
    )
    for name, stage in plan.stages.items():
        yield f"  {name:<{_WIDTH - 2}}{stage.products / 1e12:>12,.2f}      " + (
            f"{duration(seconds[name]):>12}" if seconds else ""
        )
    if plan.rates is not None:
        yield (
            f"  measured: {plan.rates.model_products / 1e9:,.0f} GFLOP/s in {model['dtype']}, "
            f"{plan.rates.float_products / 1e9:,.0f} in float32, {plan.rates.moved_bytes / 1e9:,.1f} GB/s"
        )
    for note in plan.notes:
        yield f"note: {note}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"


def duration(seconds: float) -> str:
    """Time for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
