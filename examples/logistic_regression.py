"""Bayesian logistic regression: from ten measurements of a tumour to the probability that it is malignant.

The breast cancer data that come with scikit-learn. Three of the ten features (radius, perimeter, area) say nearly the
same, so their weights are strongly correlated in the posterior. Forty percent of the patients are held out: the script
prints the weights, the verdict of the fit on itself, how well it predicts the held-out patients, and what leave-one-out
cross-validation had foretold from the training patients alone. It saves a calibration plot and the weights' intervals.

    python examples/logistic_regression.py
    python examples/logistic_regression.py --num-steps 500 --seed 1 --output pictures
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor

import pyroflows as pf

NUM_FEATURES = 10  # the means; the rest of the 30 are their errors and extremes
NUM_DRAWS = 4000
BIN_EDGES = np.array([0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0])  # narrow where most patients are
DPI = 150


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Features and labels (1: malignant) to train and to test, standardised by the training patients."""
    data = load_breast_cancer()
    names = [name.removeprefix("mean ") for name in data.feature_names[:NUM_FEATURES]]
    x, y = data.data[:, :NUM_FEATURES], 1 - data.target
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.4, random_state=seed, stratify=y)
    x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    return *(torch.tensor(part).float() for part in (x, x_test, y, y_test)), names


def model(x: Tensor, y: Tensor | None = None) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    with pyro.plate("feature", x.shape[-1]):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    logits = intercept + weight @ x.T
    with pyro.plate("patient", len(x)):
        pyro.deterministic("probability", logits.sigmoid())
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def print_weights(posterior: pf.Posterior, names: list[str]) -> None:
    table = posterior.summary().rename(index={f"weight[{i}]": name for i, name in enumerate(names)})
    print("Change of the log odds of malignant for one sd of a feature")
    print(table.loc[["intercept", *names]].to_string(float_format="{:.2f}".format))


def print_test_scores(probability: Tensor, y: Tensor, base_rate: float) -> None:
    """Of the predictive probability of malignant, the mean over the posterior."""
    accuracy = ((probability > 0.5) == (y > 0.5)).float().mean()
    score = dist.Bernoulli(probability).log_prob(y).mean()
    baseline = dist.Bernoulli(torch.tensor(base_rate)).log_prob(y).mean()
    print(f"{len(y)} held-out patients: accuracy {accuracy:.1%}, log score {score:.3f} a patient", end=" ")
    print(f"({baseline:.3f} by the base rate alone)")


def print_leave_one_out(posterior: pf.Posterior) -> None:
    data = posterior.to_arviz(NUM_DRAWS, prior=False, posterior_predictive=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # high Pareto k, which is printed here
        loo = az.loo(data, pointwise=True)
    elpd, p = (loo.elpd_loo, loo.p_loo) if hasattr(loo, "elpd_loo") else (loo.elpd, loo.p)  # ArviZ 0.x, 1.x
    num, num_high = loo.pareto_k.size, int((loo.pareto_k > loo.good_k).sum())
    print(f"{num} training patients by leave-one-out: log score {elpd / num:.3f} a patient", end=" ")
    print(f"(elpd_loo {elpd:.1f} +- {loo.se:.1f}, p_loo {p:.1f})")
    print(f"  its estimate is unreliable for {num_high} of {num} patients, whose Pareto k is above {loo.good_k:.2f}")


def plot_calibration(probability: np.ndarray, replicated: np.ndarray, y: np.ndarray) -> Any:
    """What was predicted against what happened, in bins; the intervals are those of replicated outcomes."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), height_ratios=[3, 1], layout="constrained")
    top.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1, label="perfect calibration")
    bins = np.digitize(probability, BIN_EDGES[1:-1])
    members = [bins == b for b in np.unique(bins)]
    center = [probability[inside].mean() for inside in members]
    low, high = np.transpose([np.quantile(replicated[:, inside].mean(1), [0.05, 0.95]) for inside in members])
    top.vlines(center, low, high, color="C0", linewidth=6, alpha=0.35, label="90% interval, if the model is right")
    top.plot(center, [y[inside].mean() for inside in members], "o", color="C1", label="observed")
    for x, inside in zip(center, members, strict=True):
        top.annotate(f"n={inside.sum()}", (x, 1.07), ha="center", color="gray", fontsize="small")
    top.set(ylim=(-0.03, 1.14), ylabel="fraction that is malignant")
    top.legend(loc="lower right")
    groups = [probability[y == 0], probability[y == 1]]
    bottom.hist(groups, np.linspace(0, 1, 21), stacked=True, color=["lightgray", "C3"], label=["benign", "malignant"])
    bottom.set(xlabel="predicted probability of malignant", ylabel="patients")
    bottom.legend(loc="upper center")
    figure.suptitle("Held-out patients: predicted probability against observed fraction")
    return figure


def plot_weights(weight: np.ndarray, names: list[str]) -> Any:
    """Medians with intervals of 50% and 90%, largest on top."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    order = np.argsort(np.median(weight, 0))
    low, lower, median, upper, high = np.quantile(weight[:, order], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    rows = np.arange(len(names))
    axis.axvline(0, color="gray", linestyle="--", linewidth=1)
    axis.hlines(rows, low, high, color="C0", linewidth=1.5, label="90%")
    axis.hlines(rows, lower, upper, color="C0", linewidth=5, label="50%")
    axis.plot(median, rows, "o", color="white", markeredgecolor="C0", label="median")
    axis.set_yticks(rows, [names[i] for i in order])
    axis.set_xlabel("change of the log odds of malignant for one sd of the feature")
    axis.set_title("Weights of the logistic regression")
    axis.legend(loc="lower right")
    return figure


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    pyro.set_rng_seed(args.seed)
    x, x_test, y, y_test, names = load_data(args.seed)
    print(f"Breast cancer: {x.shape[1]} features, {len(x)} patients to train on, {len(x_test)} held out\n")

    vi = pf.FlowVI(
        model, num_steps=args.num_steps, num_particles=args.num_particles, progress_bar=not args.no_progress_bar
    )
    start = time.perf_counter()
    posterior = vi.run(x, y)
    print(f"Fitted in {time.perf_counter() - start:.1f} s, {posterior.history.num_steps} steps.\n")

    print_weights(posterior, names)
    print(f"\n{posterior.diagnose()}\n")
    predicted = posterior.predictive(NUM_DRAWS, x_test)
    probability = predicted["probability"].mean(0)
    print_test_scores(probability, y_test, y.mean().item())
    print_leave_one_out(posterior)

    args.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "calibration": plot_calibration(probability.numpy(), predicted["y"].numpy(), y_test.numpy()),
        "weights": plot_weights(posterior.sample(NUM_DRAWS)["weight"].numpy(), names),
    }
    print()
    for name, figure in figures.items():
        path = args.output / f"logistic_regression_{name}.png"
        figure.savefig(path, dpi=DPI)
        print(f"saved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bayesian logistic regression by a flow")
    parser.add_argument("-n", "--num-steps", type=int, help="training steps (default: as many as it takes)")
    parser.add_argument("--num-particles", type=int, help="draws a step (default: the library's)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers and the split (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
