"""One run: from a plan and its calibration text to a pruned model, in memory or in files.

Two entries lead here: `FistaPruner.prune` for a loaded model, and `named.prune_named` for a model given by name. They
make the `Plan` (what is pruned and how), read the calibration text (`Calibration`, and `HeldOut` for perplexities), and
choose the `Sink`, where everything that is pruned goes: the model in memory, or files. The steps of a run are named in
`run`: budgets, share of this process, decoder layers, completion.
"""

from functools import partial

from optimum_fista.model.held_out import HeldOut
from optimum_fista.prune.batches import Calibration
from optimum_fista.prune.budgets import share_budgets
from optimum_fista.prune.callback import tell_begin
from optimum_fista.prune.loop import prune_layers
from optimum_fista.prune.plan import Plan
from optimum_fista.prune.sink import Sink, Work
from optimum_fista.report import PruningReport


def run(
    plan: Plan,
    calibration: Calibration,
    held_out: HeldOut | None,
    report: PruningReport,
    sink: Sink,
    started: float,
) -> PruningReport:
    """Prune the decoder layers of a model, and return the report of the whole run.

    Callbacks are called with everything but the end of the run, which their caller tells them. The sink decides what is
    left in the end: a changed model in memory, or new files. In a run to files, the weights and the configuration of
    the lazily loaded model change on the way. After an error, a model in memory is as it was. `held_out` and `report`
    are changed; `plan` and `calibration` are not.

    Args:
        plan: What is pruned and how, without budgets.
        calibration: The batches of the calibration text (`batches.read_calibration`), without hidden states.
        held_out: Measures the perplexity on its way through the decoder layers, and gets the losses; `None` if it is
            not measured.
        report: The report as `batches.read_calibration` began it; it is completed in place. Of a run to files, the
            returned one is another, which names the operators as the files do.
        sink: Where pruned weights go.
        started: The time of `time.perf_counter` at which the user's call began.
    """
    with sink.opened(plan.products):
        # `together`: in every process of the run, and each waits for the others.
        sink.together(partial(tell_begin, plan.callbacks, report))

        # Measured on the dense model, so before any layer is pruned. The sink calls `share_budgets` in one process, and
        # only if no earlier start of the run did; the report gets the seconds.
        budgets = sink.budgets(partial(share_budgets, plan, calibration.batches, report))
        plan = plan.with_budgets(budgets)
        work = sink.share(plan, calibration, held_out, report)
        sink.together(partial(_prune_share, plan, work, report, sink))
        return sink.complete(plan, report, work.held_out, started)


def _prune_share(plan: Plan, work: Work, report: PruningReport, sink: Sink) -> None:
    """Prune the decoder layers of this process, `work.todo`; it may have none.

    Weights are overwritten through `sink`, and results are added to `report`. `plan` has its budgets. The progress bar
    begins at `work.num_done`, the layers that earlier starts have finished.
    """
    if work.todo:
        prune_layers(
            plan,
            work.calibration,
            report,
            sink,
            held_out=work.held_out,
            todo=work.todo,
            num_done=work.num_done,
        )
