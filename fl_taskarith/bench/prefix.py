"""Rounds on cached tokens of the frozen blocks, against the same rounds without a cache and rounds of all blocks."""

from fl_taskarith.bench.report import Bench, median
from fl_taskarith.bench.worker import CLIENTS, LOCAL_STEPS, rounds_config, rounds_in_turn
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.workspace.machine import available_threads, choose_device

ARMS = {"all blocks": (0, "off"), "last blocks": (1, "off"), "cached": (1, "float16")}  # (blocks / wanted, cache)


def bench_prefix(
    model_name: str = "vit_small_patch14_dinov2",
    input_size: int = 98,
    trainable_blocks: int = 2,
    batch_size: int = 32,
    repeats: int = 2,
    device_name: str = "auto",
) -> Bench:
    """Seconds of a round of 10 clients x 4 steps: all blocks, the last ones, and those on cached tokens, in turn.

    Synthetic images, flips as the only augmentation in every arm, a process each. Making the cache is timed apart.

    Raises:
        RuntimeError: the last blocks learn otherwise with the cache than without.
    """
    with scratch_folder() as folder:
        configs = {
            arm: rounds_config(
                folder, model_name, input_size, batch_size, device_name, augmentation="flip",
                trainable_blocks=few * trainable_blocks, prefix_cache=cache, threads=available_threads(),
                results_dir=str(folder / arm.replace(" ", "-")),
            )
            for arm, (few, cache) in ARMS.items()
        }  # fmt: skip
        measured, losses = rounds_in_turn(configs, repeats)
    if abs(losses["cached"] - losses["last blocks"]) > 1e-2 * abs(losses["last blocks"]):
        raise RuntimeError(f"losses with and without the cache differ: {losses}")
    per_round = {arm: median(seconds) for arm, seconds in measured.items()}
    without = per_round["last blocks"] / per_round["cached"]
    images = CLIENTS * LOCAL_STEPS * batch_size
    lines = [
        f"{model_name} at {input_size} px, {CLIENTS} clients x {LOCAL_STEPS} steps of {batch_size} images, median of "
        f"{repeats} on {choose_device(device_name).type} with {available_threads()} threads",
        *(
            f"{arm:<12} {seconds:7.2f} s per round  {images / seconds:7.1f} images/s  loss {losses[arm]:.4f}"
            for arm, seconds in per_round.items()
        ),
        f"against the last {trainable_blocks} blocks without a cache: {without:.2f}",
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "trainable_blocks": trainable_blocks,
        "batch_size": batch_size,
        "clients": CLIENTS,
        "local_steps": LOCAL_STEPS,
        "repeats": repeats,
        "seconds": measured,
        "seconds_per_round": per_round,
        "train_loss": losses,
    }
    return Bench("prefix", per_round["all blocks"] / per_round["cached"], figures, tuple(lines))
