"""Eight schools: a hierarchical model whose posterior is no Gaussian, fitted by a flow.

Eight schools each measured by how many points coaching raises SAT scores, with known standard errors (Rubin 1981). The
spread tau between the schools may be near zero, and then all their effects theta are near mu: a funnel. The script
compares the flow's posterior with published reference draws and its evidence with quadrature, prints the verdict of the
fit on itself, and saves two pictures.

    python examples/eight_schools.py
    python examples/eight_schools.py --num-steps 300 --seed 1 --output pictures
"""

import argparse
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf

SCHOOLS = "ABCDEFGH"
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

# Mean and sd. reference: posteriordb, eight_schools_noncentered
REFERENCE = {
    "mu": (4.41, 3.31),
    "tau": (3.60, 3.20),
    "theta[A]": (6.15, 5.62),
    "theta[B]": (4.94, 4.65),
    "theta[C]": (3.91, 5.28),
    "theta[D]": (4.80, 4.77),
    "theta[E]": (3.61, 4.61),
    "theta[F]": (4.05, 4.80),
    "theta[G]": (6.32, 5.00),
    "theta[H]": (4.88, 5.32),
}
# By quadrature over mu and tau, the other latents integrated in closed form.
REFERENCE_LOG_EVIDENCE = -31.311

DPI = 180


def model(standard_error: torch.Tensor, y: torch.Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(standard_error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, standard_error), obs=y)


def compare(posterior: pf.Posterior) -> pd.DataFrame:
    """The posterior beside the reference, with the difference of the means in reference sds."""
    reference = pd.DataFrame.from_dict(REFERENCE, orient="index", columns=["ref mean", "ref sd"])
    table = posterior.summary().loc[reference.index].join(reference)
    table["diff/sd"] = (table["mean"] - table["ref mean"]) / table["ref sd"]
    return table


def probability_higher(posterior: pf.Posterior, school: str, other: str) -> float:
    """The posterior probability that coaching does more in one school than in another."""
    data = posterior.to_arviz(num_samples=4000, prior=False)
    theta = data["posterior"]["theta"]
    return (theta.sel(school=school) > theta.sel(school=other)).mean().item()


def save_pictures(posterior: pf.Posterior, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pairs, elbo = folder / "eight_schools_pairs.png", folder / "eight_schools_elbo.png"
    posterior.plot_pairs(var_names=["mu", "tau", "theta"], coords={"school": ["A"]}).savefig(pairs, dpi=DPI)
    training = posterior.plot_training()
    training.suptitle("Eight schools: training of the flow")
    top = training.axes[0]
    top.axhline(REFERENCE_LOG_EVIDENCE, color="black", linestyle="--", label="log evidence, the ELBO's upper bound")
    top.legend(loc="lower right")
    training.savefig(elbo, dpi=DPI)
    return [pairs, elbo]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    pyro.set_rng_seed(args.seed)
    print("Eight schools (Rubin 1981): points that coaching adds to an SAT score\n")

    posterior = pf.FlowVI(
        model,
        num_steps=args.num_steps,
        num_particles=args.num_particles,
        coords={"school": list(SCHOOLS)},
        progress_bar=not args.no_progress_bar,
    ).run(STANDARD_ERROR, EFFECT)
    print(f"Fitted in {posterior.outcome.seconds:.1f} s, {posterior.history.num_steps} steps.\n")

    print(compare(posterior).to_string(float_format="{:.2f}".format))
    print("ref: posteriordb; diff/sd: difference of the means in reference sds\n")
    print(f"log evidence {posterior.log_evidence:.3f} +- {posterior.log_evidence_se:.3f}", end=" ")
    print(f"(by quadrature {REFERENCE_LOG_EVIDENCE})")
    print(f"{posterior.diagnose()}\n")
    probability = probability_higher(posterior, "A", "C")
    print("A measured 28 points and C measured -3, and still coaching does more in A than in C only with")
    print(f"probability {probability:.2f}: most of that difference is noise.\n")
    for path in save_pictures(posterior, args.output):
        print(f"saved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Eight schools by a flow")
    parser.add_argument("-n", "--num-steps", type=int, help="training steps (default: as many as it takes)")
    parser.add_argument("--num-particles", type=int, help="draws a step (default: the library's)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
