"""Rounds whose clients are trained several at once, against the same rounds with one client after the other."""

from fl_taskarith.bench.report import Bench, median
from fl_taskarith.bench.worker import CLIENTS, LOCAL_STEPS, rounds_config, rounds_in_turn
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.workspace.machine import choose_device


def bench_together(
    model_name: str = "vit_glyph",
    input_size: int = 16,
    batch_size: int = 16,
    clients: list[int] | None = None,
    repeats: int = 9,
    device_name: str = "auto",
) -> Bench:
    """Seconds of a round of 10 clients x 4 steps of all weights, so many `clients` at once, in turn; one thread each.

    The ratio is that of one by one to the fastest of the others.

    Raises:
        RuntimeError: the clients learn otherwise together than alone.
    """
    with scratch_folder() as folder:
        configs = {
            f"{at_once} at once": rounds_config(
                folder, model_name, input_size, batch_size, device_name, augmentation="none",
                clients_at_once=at_once, threads=1, results_dir=str(folder / str(at_once)),
            )
            for at_once in sorted({1, *(clients or (2, 5, 10))})
        }  # fmt: skip
        measured, losses = rounds_in_turn(configs, repeats)
    per_round = {name: median(seconds) for name, seconds in measured.items()}
    alone, *others = per_round
    if any(abs(losses[name] - losses[alone]) > 1e-3 * abs(losses[alone]) for name in others):
        raise RuntimeError(f"losses of clients together and alone differ: {losses}")
    lines = [
        f"{model_name} at {input_size} px, {CLIENTS} clients x {LOCAL_STEPS} steps of {batch_size} images, median of "
        f"{repeats} on {choose_device(device_name).type} with one thread",
        *(f"{name:<12} {1e3 * seconds:8.1f} ms per round  loss {losses[name]:.4f}"
          for name, seconds in per_round.items()),
    ]  # fmt: skip
    figures = {
        "model": model_name,
        "input_size": input_size,
        "batch_size": batch_size,
        "clients": CLIENTS,
        "local_steps": LOCAL_STEPS,
        "repeats": repeats,
        "seconds": measured,
        "seconds_per_round": per_round,
        "train_loss": losses,
    }
    return Bench("together", per_round[alone] / min(per_round[name] for name in others), figures, tuple(lines))
