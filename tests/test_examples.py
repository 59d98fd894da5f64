"""Every example runs from the command line, in small; and the parts that could be wrong without being seen."""

import importlib.util
import runpy
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from pyroflows.training.objective import trained_parameters

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

EXAMPLES = Path(__file__).parents[1] / "examples"
RATE = 4000
SILENCE, NOISE = np.zeros(1024), np.random.default_rng(0).standard_normal(1024)


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wavenet():
    return example("parallel_wavenet")


def tone(pitch, seconds, rate=RATE):
    """Ten harmonics below 1800 Hz."""
    k = np.arange(1, 11)[:, None]
    phase = 2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate
    return 0.1 * (np.cos(k * phase) * (k * pitch < 1800) / np.sqrt(k)).sum(0)


def write_pcm(path, x, rate, num_channels=1, num_bytes=2):
    with wave.open(str(path), "wb") as file:
        file.setparams((num_channels, num_bytes, rate, 0, "NONE", ""))
        file.writeframes((x * (2 ** (8 * num_bytes - 1) - 1)).round().astype(f"<i{num_bytes}").tobytes())


def tiny(wavenet, folder, *more):
    sizes = ["--length", "512", "--width", "4", "--student-width", "4", "--blocks", "3", "--max-epochs", "1"]
    steps = ["--warm-start", "2", "--num-steps", "2", "--num-sounds", "40"]
    return wavenet.parsed([*sizes, *steps, "--no-progress-bar", "--output", str(folder), *more])


@pytest.mark.parametrize("pitch", [80.0, 99.7, 141.0, 205.2, 287.3, 397.5])
def test_pitch_of_tones(wavenet, pitch):
    noise = 0.01 * np.random.default_rng(0).standard_normal(1024)
    found, voicing = wavenet.estimate_pitch(tone(pitch, 0.256) + noise, RATE)
    assert found == pytest.approx(pitch, rel=0.001)
    assert voicing > 0.8


def test_pitch_of_the_sounds_made(wavenet):
    sounds = wavenet.harmonic_sounds(100, 1024, RATE, np.random.default_rng(0))
    found = [wavenet.estimate_pitch(x, RATE)[0] for x in sounds.x]
    np.testing.assert_allclose(found, sounds.pitch, rtol=0.01)


@pytest.mark.parametrize("x", [SILENCE, NOISE], ids=["silence", "noise"])
def test_what_has_no_pitch(wavenet, x):
    assert wavenet.estimate_pitch(x, RATE)[1] < wavenet.MIN_VOICING


def test_wav_files_are_read_as_written(wavenet, tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, 1000)
    wavenet.write_wav(tmp_path / "x.wav", x, 8000)
    found, rate = wavenet.read_wav(tmp_path / "x.wav")
    assert rate == 8000
    np.testing.assert_allclose(found, x, atol=2 / 2**15)


def test_channels_are_averaged(wavenet, tmp_path):
    x = tone(200.0, 0.1)
    write_pcm(tmp_path / "x.wav", np.stack([x, np.zeros_like(x)], -1), RATE, num_channels=2)
    np.testing.assert_allclose(wavenet.read_wav(tmp_path / "x.wav")[0], x / 2, atol=2 / 2**15)


@pytest.mark.parametrize("rate", [11025, 44100, 3000])
def test_resampling_keeps_tones(wavenet, rate):
    x = wavenet.resampled(tone(140.0, 0.48, rate), rate, RATE)
    expected = tone(140.0, 0.48)
    assert len(x) == len(expected)
    inside = slice(200, -200)  # a transform takes the end and the start of a sound for neighbours
    assert np.abs(x - expected)[inside].max() < 0.02 * np.abs(expected).max()


def test_folder_of_wav_files(wavenet, tmp_path, capsys):
    long = tone(150.0, 2.0, 11025)
    write_pcm(tmp_path / "a.wav", np.stack([long, long], -1), 11025, num_channels=2)
    write_pcm(tmp_path / "b.WAV", tone(250.0, 1.0, 8000), 8000)
    write_pcm(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    write_pcm(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-0.3, 0.3, RATE), RATE)
    write_pcm(tmp_path / "wide.wav", tone(250.0, 1.0), RATE, num_bytes=4)
    (tmp_path / "text.wav").write_text("no sound")
    sounds = wavenet.sounds_of_folder(tmp_path, 512, RATE)
    # 8000 and 4000 samples, in steps of 256.
    assert sounds.x.shape == (30 + 14, 512)
    np.testing.assert_allclose(sounds.pitch, [150.0] * 30 + [250.0] * 14, rtol=0.005)
    printed = capsys.readouterr().out
    assert "wide.wav is left out: 32 bits" in printed
    assert "text.wav is left out" in printed
    assert "44 clips; 14 silent and 14 without a pitch" in printed
    # The conditioning is in phase with the fundamental.
    context = wavenet.conditioning(sounds.pitch, sounds.offset, 512, RATE).numpy()
    assert ((context[:, 0] * sounds.x).mean(-1) > 0.2).all()
    assert np.abs((context[:, 1] * sounds.x).mean(-1)).max() < 0.02


def test_folder_without_usable_sounds(wavenet, tmp_path):
    write_pcm(tmp_path / "short.wav", tone(200.0, 0.5), RATE)
    with pytest.raises(SystemExit, match="has 6 usable clips, and 20 are needed"):
        wavenet.sounds_of_folder(tmp_path, 512, RATE)


def test_teacher_draws_what_full_passes_draw(wavenet, tmp_path):
    args = tiny(wavenet, tmp_path, "--length", "100", "--blocks", "6")
    torch.manual_seed(0)
    teacher, _ = wavenet.make_flows(args)
    for parameter in trained_parameters(teacher):
        torch.nn.init.normal_(parameter, std=0.3)
    context = wavenet.conditioning(np.array([90.0, 210.0]), np.array([1.0, 2.0]), 100, RATE)
    layer = teacher.transform.layers[0].inv
    z = torch.randn(2, 100)
    with torch.no_grad():
        x, _ = teacher(context).transport(z)
        expected = torch.zeros(2, 100)
        for t in range(100):  # the parameters at t depend on what stands before t only
            theta = layer.conditioner(expected, context)
            expected[:, t] = layer.univariate.inverse_and_ladj(z[:, t], theta[:, t])[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


# Clips of a pure tone repeat each other.
@pytest.mark.filterwarnings("ignore:columns .* of x take few values")
@pytest.mark.parametrize("from_folder", [pytest.param(False, marks=pytest.mark.slow), True])
def test_example_runs(wavenet, tmp_path, capsys, from_folder):
    sources = tmp_path / "sources"
    sources.mkdir()
    if from_folder:
        write_pcm(sources / "a.wav", tone(150.0, 2.0), RATE)
    wavenet.main(tiny(wavenet, tmp_path, *(["--wav-folder", str(sources)] if from_folder else [])))
    for name in ("teacher", "student"):
        x, rate = wavenet.read_wav(tmp_path / f"parallel_wavenet_{name}.wav")
        assert (len(x), rate) == (10 * 512, RATE)
        assert 0.02 < x.std() < 0.8
    assert matplotlib.image.imread(tmp_path / "parallel_wavenet_spectrograms.png").shape[2] == 4
    printed = capsys.readouterr().out
    assert "pitch of the student" in printed and "times as fast" in printed


# Arguments that make an example small, some of what it prints, and its pictures.
def test_no_pixel_of_a_photograph_is_both_trained_on_and_held_out(monkeypatch):
    images = example("glow_images")
    photographs = np.arange(2 * 427 * 640 * 3).reshape(2, 427, 640, 3)
    monkeypatch.setattr(images, "load_sample_images", lambda: SimpleNamespace(images=list(photographs)))
    found = images.patches()
    assert found.x.shape[1:] == found.held_out.shape[1:] == (3, 16, 16)
    trained, held_out = (set(x.flatten().tolist()) for x in (found.x, found.held_out))
    assert not trained & held_out
    # Held-out patches share no pixels, and each has the class of its photograph.
    assert len(held_out) == found.held_out.numel()
    assert (found.held_out.flatten(1).amin(1) // photographs[0].size == found.held_out_classes).all()
    # A row of a patch is a row of its photograph.
    assert (found.x.diff(dim=3) == 3).all() and (found.x.diff(dim=2) == 3 * 640).all()


def test_widths_are_found_that_give_flows_of_a_size():
    images = example("glow_images")
    sizes = [2, 4, 7, 12, 20, 33]

    def make(width):
        return torch.nn.Linear(width, width, bias=False)

    for size in sizes:
        assert images.of_size(make, size**2 + 1).in_features == size


def test_density_of_the_pinwheel():
    matching = example("flow_matching")
    torch.manual_seed(0)
    points = matching.draw_pinwheel(20_000, 5)
    line = torch.linspace(-3, 3, 601)
    grid = torch.cartesian_prod(line, line)
    density = matching.true_log_prob(grid, 5).exp()
    assert density.sum() * 0.01**2 == pytest.approx(1.0, abs=1e-3)
    # Moments that no rotation by a fifth of a turn keeps, so that a wrong direction of the twist is seen.
    x, y = (points / points.norm(dim=-1, keepdim=True)).T
    angle, grid_angle = torch.atan2(y, x), torch.atan2(grid[:, 1], grid[:, 0])
    for moment in (torch.cos, torch.sin):
        values = moment(5 * angle) * points.norm(dim=-1)
        expected = (moment(5 * grid_angle) * grid.norm(dim=-1) * density).sum() * 0.01**2
        assert values.mean() == pytest.approx(expected.item(), abs=5 * values.std().item() / 20_000**0.5)


def test_final_size_of_an_epidemic():
    epidemic = example("amortized_inference")
    reproduction, duration, first = torch.tensor([1.5, 3.0]), torch.tensor([5.0, 8.0]), torch.tensor([10.0, 1000.0])
    new = epidemic.new_infections(reproduction.double(), duration.double(), first.double(), 1000).sum(-1)
    left = 1 - (new + first) / epidemic.POPULATION
    started = 1 - first / epidemic.POPULATION
    # Kermack and McKendrick (1927): ln(s_0 / s_end) = R (1 - s_end).
    torch.testing.assert_close((started / left).log(), (reproduction * (1 - left)).double(), rtol=1e-5, atol=0.0)


def test_coefficients_are_integrated_out():
    """Differences of the log marginal between globals are those of the law of all rows."""
    hierarchy = example("hierarchical_minibatch")
    torch.manual_seed(0)
    groups = hierarchy.simulate(3, 7)
    x, y = groups.x.double(), groups.y.double()

    def by_hand(mean, spread, corr, sigma):
        covariance = torch.diag(spread**2)
        covariance[0, 1] = covariance[1, 0] = corr * spread.prod()
        design = torch.stack([torch.ones_like(x), x], -1)
        of_rows = design @ covariance @ design.mT + sigma**2 * torch.eye(7)
        return torch.distributions.MultivariateNormal(design @ mean, of_rows).log_prob(y).sum()

    def by_model(**values):
        model = poutine.condition(hierarchy.without_coefficients(x, y), values)
        trace = poutine.trace(model).get_trace()
        trace.compute_log_prob()
        return sum(trace.nodes[name]["log_prob_sum"] for name in ("slopes", "means", "squares"))

    def globals_(*values):
        mean, spread, corr, sigma = (torch.tensor(value, dtype=torch.float64) for value in values)
        return {"mean": mean, "spread": spread, "corr": corr, "sigma": sigma}

    some = [globals_([0.5, -1.0], [0.7, 1.2], 0.3, 1.1), globals_([1.5, 0.2], [1.3, 0.4], -0.6, 1.9)]
    expected, found = ([function(**values) for values in some] for function in (by_hand, by_model))
    torch.testing.assert_close(found[1] - found[0], expected[1] - expected[0], rtol=1e-5, atol=0.0)


@pytest.mark.slow
def test_globals_of_many_groups_are_about_as_wide_as_by_chains():
    """Noise in how 2,000 groups depend on the globals adds up, and has made an sd three times too small."""
    hierarchy = example("hierarchical_minibatch")
    pyro.set_rng_seed(0)
    groups = hierarchy.simulate(2000, 100)
    args = SimpleNamespace(num_steps=1000, num_chain_draws=200, no_progress_bar=True)
    found = hierarchy.globals_of(hierarchy.fit(groups, 200, args).sample(hierarchy.NUM_DRAWS))
    reference = hierarchy.chains_of_all(groups, args)
    assert ((found.mean(0) - reference.mean(0)) / reference.std(0)).abs().max() < 0.2
    ratios = found.std(0) / reference.std(0)
    assert ratios.min() > 0.5 and ratios.max() < 1.4


def test_exact_law_of_coefficients():
    hierarchy = example("hierarchical_minibatch")
    torch.manual_seed(0)
    groups = hierarchy.simulate(3, 7)
    spread, corr, sigma = hierarchy.SPREAD, hierarchy.CORRELATION, hierarchy.SIGMA
    draws = {"mean": hierarchy.MEAN, "spread": spread, "corr": torch.tensor(corr), "sigma": torch.tensor(sigma)}
    draws = {name: torch.stack([value, value]).double() for name, value in draws.items()}  # the globals do not vary
    mean, sd = hierarchy.exact_law(draws, groups.x.double(), groups.y.double())
    # The law of coefficients and rows together, conditioned on the rows.
    prior = torch.tensor([[spread[0] ** 2, corr * spread.prod()], [corr * spread.prod(), spread[1] ** 2]]).double()
    for k, (x, y) in enumerate(zip(groups.x.double(), groups.y.double(), strict=True)):
        design = torch.stack([torch.ones_like(x), x], -1)
        of_rows = design @ prior @ design.T + sigma**2 * torch.eye(7)
        gain = prior @ design.T @ torch.linalg.inv(of_rows)
        torch.testing.assert_close(mean[k], hierarchy.MEAN + gain @ (y - design @ hierarchy.MEAN.double()))
        torch.testing.assert_close(sd[k], (prior - gain @ design @ prior).diagonal().sqrt())


def test_laws_of_discrete_flows():
    flows = example("discrete_flow")
    for make in flows.LAWS.values():
        law = make()
        # Its normalisation is a sum in float32, whose rounding grows with the square root of the number of cells.
        rounding = torch.finfo(law.dtype).eps * law.numel() ** 0.5
        assert law.double().sum().item() == pytest.approx(1.0, abs=max(1e-5, rounding))
    gaussians = flows.eight_gaussians()
    assert (gaussians[45, 45] < 1e-6) and gaussians.flatten().topk(8).values.std() < 1e-3
    torch.testing.assert_close(gaussians, gaussians.T)
    torch.testing.assert_close(gaussians, gaussians.flip(0))
    # Of twelve pairs of neighbours all agree, or all but the two of a corner.
    potts = flows.potts().flatten()
    assert (potts[0] / potts[1]).log() == pytest.approx(0.5 * 2)
    assert flows._counted(torch.tensor([[0, 2], [0, 2], [1, 0]]), 3).tolist() == [[0, 0, 2], [1, 0, 0], [0, 0, 0]]


def test_windows_of_text():
    flows = example("discrete_flow")
    text = flows.read_text(flows.PASSAGE)
    words = "".join(flows.CHARACTERS[k] for k in text)
    assert words.startswith("pride and prejudice by jane austen chapter it is a truth universally acknowledged that a")
    assert "  " not in words and len(words) > 100_000
    windows = flows.Windows(torch.arange(100), 12)
    assert len(windows) == 4
    drawn = torch.stack([windows[i] for i in [1] * 200])
    assert (drawn.diff(dim=1) == 1).all()
    assert drawn.min() == 24 and drawn.max() == 47  # all within its own part


@pytest.mark.parametrize("has_flows", [False, True])
def test_log_likelihood_where_codes_change_nothing(has_flows):
    example_vae = example("vae")
    torch.manual_seed(0)
    x = torch.randint(0, example_vae.MAX_LEVEL + 1, (3, example_vae.NUM_PIXELS)).float()
    vae = example_vae.with_flows() if has_flows else example_vae.plain(0)
    with torch.no_grad():
        for parameter in [*vae.prior.parameters(), *vae.posterior.parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
    last = vae.decoder[-1]
    torch.nn.init.zeros_(last.weight)
    expected = example_vae.dist.Binomial(example_vae.MAX_LEVEL, logits=last.bias).to_event(1).log_prob(x)
    found = example_vae.scores(vae, x, 4000)
    assert (found.error > 0.002).all() and (found.error < 0.1).all()
    assert ((found.log_likelihood - expected).abs() < 4 * found.error).all()
    assert (found.effective > 400).all() and (found.effective < 3900).all()
    assert example_vae.mean_elbo(vae, x, 4000) < expected.mean() - 0.05


def test_weight_of_the_code_acts_on_prior_and_posterior_alike():
    vae = example("vae")
    plain, x = vae.plain(0), torch.ones(20, vae.NUM_PIXELS)  # before training, its posterior is its prior

    def loss(code_weight):
        vae.pyro.set_rng_seed(0)
        return vae.Trace_ELBO().loss(plain.model, plain.guide, x, None, code_weight)

    assert loss(0.1) == pytest.approx(loss(1.0), rel=1e-6)


def test_training_of_an_autoencoder_keeps_the_best_state(monkeypatch):
    vae = example("vae")
    torch.manual_seed(0)
    monkeypatch.setattr(vae, "VALIDATE_EVERY", 1)
    elbos = iter([-3.0, -1.0, -2.0, -4.0])
    states = []

    def elbo(plain, validation, num_draws):
        states.append([parameter.clone() for parameter in plain.parameters()])
        return next(elbos)

    monkeypatch.setattr(vae, "mean_elbo", elbo)
    plain, x = vae.plain(0), torch.randint(0, vae.MAX_LEVEL + 1, (200, vae.NUM_PIXELS)).float()
    assert vae.train(plain, x, x, 4, False) == 2
    assert all(map(torch.equal, plain.parameters(), states[1]))
    assert not all(map(torch.equal, states[1], states[3]))


def test_plain_autoencoder_has_the_size_of_that_with_flows():
    vae = example("vae")
    size = vae.num_parameters(vae.with_flows())
    assert abs(vae.num_parameters(vae.plain(size)) - size) < 0.05 * size


RUNS = {
    "amortized_inference": (
        [*("--num-simulations", "500", "--max-epochs", "5"), *("--num-outbreaks", "2", "--num-datasets", "10")],
        ["draws of the posterior of each", "verdicts by the likelihood", "calibration of the corrected posteriors"],
        [
            f"amortized_inference_{name}"
            for name in ("recovery", "forecasts", "calibration_flow", "calibration_corrected")
        ],
    ),
    "density_2d": (
        ["--families", "RealNVP", "NSF", "--shapes", "moons", "rings", "--num-rows", "600", "--max-epochs", "2"],
        ["mean log-density of held-out rows"],
        ["density_2d_RealNVP", "density_2d_NSF"],
    ),
    "digits": (
        ["--layers", "2", "--max-epochs", "2", "--threads", "1"],
        ["bits per dimension", "the right one"],
        ["digits_samples", "digits_training"],
    ),
    "discrete_flow": (
        [
            "--num-rows",
            "200",
            "--max-epochs",
            "1",
            "--text-epochs",
            "1",
            "--length",
            "128",
            "--groups",
            "8",
            "--width",
            "4",
        ],
        ["entropy", "bits a character", "times as fast"],
        ["discrete_flow"],
    ),
    "distillation": (
        ["--layers", "2", "--width", "8", "--max-epochs", "2", "--num-steps", "20"],
        ["KL(student || teacher)", "held-out tumours", "times as fast"],
        ["distillation_pairs", "distillation_training"],
    ),
    "eight_schools": (
        ["--num-steps", "20", "--num-particles", "8"],
        ["log evidence", "k-hat", "most of that difference is noise"],
        ["eight_schools_pairs", "eight_schools_elbo"],
    ),
    "flow_matching": (
        ["--num-rows", "500", "--width", "8", "--max-epochs", "2"],
        ["mean log-density of 5000 fresh points", "by the truth", "evaluations of the network"],
        ["flow_matching"],
    ),
    "glow_images": (
        ["--data", "digits", "--steps", "1", "--width", "4", "--max-epochs", "1", "--threads", "1"],
        ["300 held out", "RealNVP", "emerging Glow", "bits per dimension"],
        ["glow_samples", "glow_interpolations", "glow_reconstructions"],
    ),
    "hierarchical_minibatch": (
        [
            *("--groups", "20", "--rows", "5", "--batch", "5"),
            *("--num-steps", "10", "--num-chain-draws", "5"),
        ],
        ["truth", "R-hat", "chains", "verdicts are good"],
        ["hierarchical_minibatch"],
    ),
    "logistic_regression": (
        ["--num-steps", "20", "--num-particles", "8"],
        ["held-out patients", "training patients by leave-one-out"],
        ["logistic_regression_calibration", "logistic_regression_weights"],
    ),
    "mixture_of_flows": (["--num-steps", "5"], ["fresh points", "the truth"], ["mixture_of_flows"]),
    "vae": (
        ["--num-steps", "5", "--num-draws", "20"],
        ["log-likelihood", "effective draws", "gain of the flows"],
        ["vae"],
    ),
}
LONG = {
    *("amortized_inference", "discrete_flow", "distillation", "flow_matching"),
    *("glow_images", "hierarchical_minibatch", "mixture_of_flows"),
}


def test_every_example_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*RUNS, "parallel_wavenet"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in RUNS])
def test_command_line(name, tmp_path, monkeypatch, capsys):
    arguments, printed, pictures = RUNS[name]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments, "--no-progress-bar", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    found = capsys.readouterr().out
    assert all(words in found for words in printed), found
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures)
    for path in tmp_path.glob("*.png"):
        assert matplotlib.image.imread(path).std() > 0.01  # something is drawn
    assert {path.stem for path in tmp_path.glob("*.gif")} == ({name} if name == "flow_matching" else set())
