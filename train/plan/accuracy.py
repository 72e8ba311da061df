"""ImageNet zero-shot accuracy before the run, from published runs.

A Gaussian process (kriging) on the logit of the accuracy: a polynomial in samples, size, tokens and repetition, shrunk
as a ridge regression is; a smooth remainder in samples, size and tokens; and an effect for each data set, kind of
model, loss and paper, shrunk, which alike names share. Runs that fit badly get less weight, as with Huber's loss. The
strengths of all that were chosen by what it says of groups of runs that it hasn't seen (`validate`), and its intervals
are widened until they hold 80% of those. docs/plan.md has the table.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clipkit.embedded import folder, published
from clipkit.formatting import counted, share, short
from clipkit.train.plan.columns import RunFacts, check_columns, facts_of

Array = npt.NDArray[np.float64]

Z80 = 1.2816  # of the normal distribution, for 80%
FLOOR, CEILING = 0.002, 0.995
PRETRAINED_SD = 0.15
UNSAID_LENGTH_SD = 0.4  # where the samples seen had to be assumed
WIDEST = 0.9  # in logits: beyond it the interval says nothing
# What the published runs span, with a margin: outside nothing is predicted.
SPANS: dict[str, tuple[float, float, Callable[[RunFacts], float]]] = {
    "samples": (5e5, 1e11, lambda run: run.samples),
    "weights of the image tower's blocks": (3e6, 1e10, lambda run: run.image_weights),
    "image tokens": (8, 1500, lambda run: run.image_tokens),
    "text tokens": (4, 300, lambda run: run.text_tokens),
    "pairs of the data set": (5e4, 1e11, lambda run: run.pairs),
}


class Fit(NamedTuple):
    """What was chosen when the fit was made (`python docs/plan.py --fit`)."""

    kernel: dict[str, float]
    """Amplitudes and lengths by name."""
    widening: float
    """What standard deviations are multiplied by."""
    unfamiliar: float
    """The further deviation of a run whose data are like none of the others', in logits."""
    doubt: dict[str, float]
    """By how much the noise of badly fitting runs is larger, by their ids."""


class Prediction(NamedTuple):
    """ImageNet zero-shot top-1 with an 80% interval, 0 to 1; None where not enough is known."""

    value: float | None
    low: float | None
    high: float | None
    notes: tuple[str, ...]
    """What was assumed, what repetition does, or why nothing is said."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return self._asdict() | {"notes": list(self.notes)}


@cache
def read_fit() -> Fit:
    """The fit that ships with the package."""
    return Fit(**json.loads((folder("published") / "accuracy-fit.json").read_text(encoding="utf-8")))


@cache
def known_runs() -> tuple[dict[str, Any], ...]:
    """The published runs, their empty columns left out."""
    return tuple(check_columns(row, row["id"]) for row in published("published-runs"))


class Evidence(NamedTuple):
    """The published runs as facts, with their accuracies in logits."""

    ids: tuple[str, ...]
    runs: tuple[RunFacts, ...]
    top1: Array
    logits: Array


@cache
def evidence() -> Evidence:
    """What predictions are made from."""
    rows = known_runs()
    top1 = np.array([row["imagenet_top1"] for row in rows])
    kept = np.clip(top1, FLOOR, CEILING)
    runs = tuple(facts_of(row, known_runs()) for row in rows)
    return Evidence(tuple(row["id"] for row in rows), runs, top1, np.log(kept / (1 - kept)))


# ---- What makes runs alike -------------------------------------------------------------------------------------------


def useful_samples(run: RunFacts, repeats: float) -> float:
    """Samples seen, of which repeated pairs count less and less: in all at most `repeats` times the pairs more."""
    once = min(run.samples, run.pairs)
    return once * (1 + repeats * (1 - math.exp(-(run.epochs - 1) / repeats)))


def numbers(runs: Sequence[RunFacts], kernel: Mapping[str, float]) -> Array:
    """Each run's features, centred about where the runs are: float64[runs, 11]."""
    rows = []
    for run in runs:
        values = [
            math.log10(useful_samples(run, kernel["repeats"])) - 8.5,
            math.log10(run.epochs),
            math.log10(run.image_weights) - 8,
            math.log10(run.image_tokens) - 2,
            math.log10(run.text_tokens) - 1.9,
            math.log10(run.text_gmacs) - 0.5,
            math.log10(1 + run.full_samples / 1e8) if run.is_staged else 0.0,
            math.log10(run.final_px / run.image_px),
            float(run.is_staged),
            math.log10(run.final_px) - 2.35,
            math.log10(run.batch / 16384) if run.batch else 0.0,
        ]
        rows.append(values)
    return np.array(rows)


def polynomial(x: Array, kernel: Mapping[str, float]) -> Array:
    """Features whose coefficients are all shrunk to zero with a standard deviation of one."""
    samples, epochs, size, tokens, text, text_size, full, zoom, staged, pixels, batch = x.T
    linear, repeated = kernel["linear"], kernel["repeated"]
    return np.stack(
        [
            3 * np.ones(len(x)), linear * samples, kernel["square"] * samples**2, 0.3 * samples**3,
            linear * size, kernel["size_samples"] * samples * size, linear * tokens, 0.3 * samples * tokens,
            0.7 * text, 0.3 * text_size, repeated * epochs, repeated * epochs**2, repeated * epochs * size,
            0.5 * full, zoom, 0.5 * staged, 0.5 * pixels, 0.1 * batch, 0.3 * size**2,
        ],
        axis=1,
    )  # fmt: skip


def overlap(ours: Sequence[frozenset[str]], theirs: Sequence[frozenset[str]]) -> Array:
    """How alike sets of words are: the cosine, 1 for the same words and 0 for none in common."""
    index = {word: number for number, word in enumerate(sorted(frozenset().union(*ours, *theirs)))}
    tables = []
    for sets in (ours, theirs):
        table = np.zeros((len(sets), max(1, len(index))))
        for row, words in enumerate(sets):
            table[row, [index[word] for word in words]] = 1 / math.sqrt(len(words)) if words else 0.0
        tables.append(table)
    return tables[0] @ tables[1].T


def same(ours: Sequence[str], theirs: Sequence[str]) -> Array:
    """1 where two words are the same and not empty."""
    return overlap(*([frozenset([word] if word else []) for word in words] for words in (ours, theirs)))


def covariance(ours: Sequence[RunFacts], theirs: Sequence[RunFacts], kernel: Mapping[str, float]) -> Array:
    """The prior covariance of the logits of two lists of runs: float64[ours, theirs]."""
    x, y = numbers(ours, kernel), numbers(theirs, kernel)
    distance = np.zeros((len(x), len(y)))
    for column, name in enumerate(("samples", "epochs", "size", "tokens", "text")):
        distance += (x[:, None, column] - y[None, :, column]) ** 2 / kernel[f"length_{name}"] ** 2
    slopes = np.outer(x[:, 0], y[:, 0])  # an effect may grow with the samples

    def effect(name: str, alike: Array) -> Array:
        return alike * (kernel[name] ** 2 + kernel.get(f"{name}_slope", 0.0) ** 2 * slopes)

    def column_of(name: str) -> Array:
        return same(*([getattr(run, name) for run in runs] for runs in (ours, theirs)))

    def words_of(name: str) -> Array:
        return overlap(*([getattr(run, name) for run in runs] for runs in (ours, theirs)))

    trained = [[("" if run.init == "scratch" else "yes") for run in runs] for runs in (ours, theirs)]
    has_loss = [np.array([[name in run.losses for name in LOSSES] for run in runs], float) for runs in (ours, theirs)]
    sizes = [[f"{run.image_weights:.2g}" for run in runs] for runs in (ours, theirs)]
    return (
        polynomial(x, kernel) @ polynomial(y, kernel).T
        + kernel["smooth"] ** 2 * np.exp(-0.5 * distance)
        + effect("words", words_of("dataset_words"))
        + effect("dataset", column_of("dataset"))
        + effect("family", column_of("family"))
        + effect("model", words_of("model_words"))
        + effect("loss", has_loss[0] @ has_loss[1].T)
        + effect("paper", column_of("source"))
        + effect("init", same(*trained) * (1 + column_of("init")))
        + effect("one_size", same(*sizes))
    )


LOSSES = ("captioning", "distillation", "global", "jest", "sigmoid")


def noise(ids: Sequence[str], runs: Sequence[RunFacts], fit: Fit) -> Array:
    """The variance of each run's own deviation."""
    pretrained = np.array([run.init != "scratch" for run in runs]) * PRETRAINED_SD**2
    unsaid = np.array([not run.is_length_said for run in runs]) * UNSAID_LENGTH_SD**2
    return (fit.kernel["noise"] ** 2 + pretrained + unsaid) * np.array([fit.doubt.get(each, 1.0) for each in ids])


# ---- Predicting and checking -----------------------------------------------------------------------------------------


def logit_of(runs: Sequence[RunFacts], fit: Fit) -> tuple[Array, Array]:
    """Mean and standard deviation of each run's logit, from all published runs."""
    known = evidence()
    across = covariance(runs, known.runs, fit.kernel)
    weights = inverse_covariance() @ across.T
    own = np.array([covariance([run], [run], fit.kernel)[0, 0] for run in runs])
    alike = overlap([run.dataset_words for run in runs], [run.dataset_words for run in known.runs]).max(axis=1)
    variance = own - np.sum(across * weights.T, axis=1) + noise([""] * len(runs), runs, fit)
    variance += ((1 - alike) * fit.unfamiliar) ** 2
    return weights.T @ known.logits, np.sqrt(np.maximum(variance, 1e-6)) * fit.widening


@cache
def inverse_covariance() -> Array:
    """Of the published runs' logits, as the fit that ships has it."""
    known, fit = evidence(), read_fit()
    inside = covariance(known.runs, known.runs, fit.kernel) + np.diag(noise(known.ids, known.runs, fit))
    return np.asarray(np.linalg.inv(inside))


def predict(columns: Mapping[str, Any]) -> Prediction:
    """The accuracy of a run with the columns of `published-runs.csv` (`columns.check_columns`)."""
    return predict_all([columns])[0]


def predict_all(runs: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    """The accuracies of several runs."""
    facts = [facts_of(run, known_runs()) for run in runs]
    fit = read_fit()
    means, deviations = logit_of(facts, fit)
    return [
        as_prediction(run, float(mean), float(deviation), fit)
        for run, mean, deviation in zip(facts, means, deviations, strict=True)
    ]


def as_prediction(run: RunFacts, mean: float, deviation: float, fit: Fit) -> Prediction:
    """A logit with its deviation as accuracies, or why there are none."""
    outside = [
        f"not enough is known: {short(get(run))} {name}, and the published runs have {short(low)} to {short(high)}"
        for name, (low, high, get) in SPANS.items()
        if not low <= get(run) <= high
    ]
    if not run.is_size_said:
        outside.append(
            "not enough is known: nothing tells the image tower's size: give image_width, image_depth and patch, or "
            "gmacs_image"
        )
    notes = [f"assumed {each}" for each in run.assumed]
    if run.epochs > 1.5:
        useful = useful_samples(run, fit.kernel["repeats"])
        notes.append(
            f"{short(run.pairs)} pairs are seen {run.epochs:.3g} times: the {short(run.samples)} samples count as "
            f"{short(useful)} new ones"
        )
    if not any(run.dataset.lower() == other.dataset.lower() for other in evidence().runs) and run.dataset:
        near = {other.dataset for other in evidence().runs if other.dataset_words & run.dataset_words}
        likeness = f"its name is like that of {counted(len(near), 'data set')}" if near else "its name is like none"
        notes.append(f"no published run is on {run.dataset}; {likeness}")
    if deviation > WIDEST:
        outside.append(f"not enough is known: the 80% interval would be {share(expit(mean - Z80 * deviation))} to "
                       f"{share(expit(mean + Z80 * deviation))}")  # fmt: skip
    if outside:
        return Prediction(None, None, None, (*outside, *notes))
    value, low, high = (expit(mean + sign * Z80 * deviation) for sign in (0, -1, 1))
    return Prediction(value, low, high, tuple(notes))


def expit(logit: float) -> float:
    """The accuracy of a logit."""
    return 1 / (1 + math.exp(-logit))


def validate(groupings: Mapping[str, Sequence[str]], fit: Fit) -> dict[str, tuple[Array, Array]]:
    """For each way of grouping, mean and (unwidened) deviation of each published run's logit from those outside its
    group, in closed form."""
    known = evidence()
    inverse = np.linalg.inv(covariance(known.runs, known.runs, fit.kernel) + np.diag(noise(known.ids, known.runs, fit)))
    pulled, alike = inverse @ known.logits, overlap(*[[run.dataset_words for run in known.runs]] * 2)
    # A left-out run is predicted with the noise of any run, not with what its own misfit has shown.
    surplus = noise(known.ids, known.runs, fit) - noise([""] * len(known.ids), known.runs, fit)
    found = {}
    for name, groups in groupings.items():
        means, deviations = np.empty(len(groups)), np.empty(len(groups))
        members: dict[str, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        for rows in members.values():
            block = np.linalg.inv(inverse[np.ix_(rows, rows)])
            means[rows] = known.logits[rows] - block @ pulled[rows]
            others = np.delete(alike[rows], rows, axis=1).max(axis=1)
            variance = np.diag(block) - surplus[rows] + ((1 - others) * fit.unfamiliar) ** 2
            deviations[rows] = np.sqrt(np.maximum(variance, 1e-6))
        found[name] = (means, deviations)
    return found


def groupings() -> dict[str, list[str]]:
    """By what runs are left out together: data sets, families of data sets, sizes of models, papers, series."""
    rows = known_runs()
    return {
        "data set": [row["dataset"] for row in rows],
        "model size": [
            f"{row['image_width']:.0f}x{row['image_depth']:.0f}" if "image_depth" in row else row["model"]
            for row in rows
        ],
        "paper": [row["source"] for row in rows],
        "series": [f"{row['model']} {row['dataset']} {row.get('loss')}" for row in rows],
        "family of data sets": [row["dataset"].replace("-", " ").split()[0] for row in rows],
    }
