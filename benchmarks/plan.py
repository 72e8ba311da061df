"""`clipkit plan --measure` held to this machine: five models' samples/s, predicted after two others were measured.

Asked: each within 15%. The sides take turns, three rounds; a prediction is from the same round's measurement.
"""

from clipkit.train.plan.measure import PROBES, calibrate, here, measure_step, small_recipe, step_of
from clipkit.train.plan.step import Calibration

RECIPES = (
    small_recipe(192, 6, 96, 16),
    small_recipe(256, 4, 112, 16),
    small_recipe(384, 4, 64, 32),
    small_recipe(256, 8, 64, 8),
    small_recipe(384, 6, 96, 16),
)


def main() -> None:
    """Print measured and predicted samples/s."""
    device, chip = here()
    print("| round | model | measured, samples/s | predicted | ratio |\n|---|---|---|---|---|")
    worst = 1.0
    for number in range(3):
        steps = [step_of(recipe, device, chip, Calibration()) for recipe in PROBES]
        calibration = calibrate(steps, [measure_step(recipe, device) for recipe in PROBES])
        for recipe in RECIPES:
            batch = recipe.stages[0].batch_size
            measured = batch / measure_step(recipe, device)
            predicted = batch / sum(step_of(recipe, device, chip, calibration).seconds())
            worst = max(worst, predicted / measured, measured / predicted)
            row = f"{measured:.1f} | {predicted:.1f} | {predicted / measured:.2f}"
            print(f"| {number + 1} | {recipe.name} | {row} |", flush=True)
    print(f"\nfurthest: {worst:.2f} (asked: 1.15); calibration {calibration}")


if __name__ == "__main__":
    main()
