"""Parallel WaveNet in small: a slow teacher of sounds, and a student that makes a whole sound in one pass.

The teacher is a WaveNet (van den Oord et al. 2016, arXiv:1609.03499): each sample of a sound is Gaussian given those
before it, so that it scores a sound in one pass and must draw it sample by sample. The student is a stack of four
inverse autoregressive flows, which draw in one pass. It is distilled from the teacher (van den Oord et al. 2018,
arXiv:1711.10433), with the KL divergence of Gaussians in closed form (ClariNet, Ping et al. 2019, arXiv:1807.07281).
KL(student || teacher) alone ends in whispering, since quiet sounds are easy to predict. As in those papers a loss on
the spectrum, here averaged over time, is against that, and so is the regression on the teacher's draws in ``distill``.

The sounds are made here: harmonics of a random pitch through two random resonances, with attack, decay and breath. The
pitch enters as cosine and sine of the phase of the fundamental at each sample, as in neural source-filter models (Wang
et al. 2019, arXiv:1904.12088), and as a number besides. The number alone would be harder: noise is all that the student
sees, and every sample would have to find the common phase in it, which the teacher just reads off the samples before.
Timbre, loudness over time and breath are not told: they are what the flows have to make of their noise.

    python examples/parallel_wavenet.py
    python examples/parallel_wavenet.py --rate 8000 --length 4096 --width 32 --blocks 9 --num-steps 4000 --device cuda
    python examples/parallel_wavenet.py --wav-folder recordings

A folder of WAV files (16-bit PCM of any rate, mono or stereo) takes the place of the sounds. They are cut into clips,
of which those with a steady pitch are kept: notes of an instrument, or sung vowels. Prints whether the student keeps
the pitch, how far its sounds are from the teacher's and how much faster they are drawn; saves both as WAV and as a
picture. One core gains little where it draws many sounds at once: then arithmetic is all that counts, and four stages
are four networks, which therefore are narrower than the teacher's.
"""

import argparse
import time
import wave
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.nets import CausalConv
from pyroflows.transforms import Autoregressive, Standardize
from pyroflows.transforms.univariate import Affine

PITCHES = (80.0, 400.0)  # Hz
BREATH = 0.1  # of the level of the harmonics
NUM_STAGES = 4
NUM_TESTED = 50
BATCH_SIZE = 8
SPECTRAL_WEIGHT = 1000.0
FLOOR = 1e-4  # power below which spectra are not compared
# Of clips from a folder: root mean square of full scale, height of the peak of the autocorrelation, and their number.
MIN_LEVEL, MIN_VOICING, MIN_CLIPS = 0.01, 0.5, 20
DPI = 130


class Sounds(NamedTuple):
    x: np.ndarray  # (n, length), each of variance 1
    pitch: np.ndarray  # (n,), Hz
    offset: np.ndarray  # (n,), phase of the fundamental at the first sample


def phases(pitch: np.ndarray, offset: np.ndarray, length: int, rate: int) -> np.ndarray:
    return 2 * np.pi * pitch[:, None] * np.arange(length) / rate + offset[:, None]


def conditioning(pitch: np.ndarray, offset: np.ndarray, length: int, rate: int) -> Tensor:
    """Cosine and sine of the phase of the fundamental, and the pitch in octaves, ``(n, 3, length)``."""
    phase = phases(pitch, offset, length, rate)
    octaves = np.broadcast_to(np.log2(pitch / 180)[:, None], phase.shape)
    return torch.as_tensor(np.stack([np.cos(phase), np.sin(phase), octaves], 1), dtype=torch.float32)


def random_pitches(count: int, pitches: tuple[float, float], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pitches, evenly on the logarithmic scale, and phases."""
    return np.exp(rng.uniform(*np.log(pitches), count)), rng.uniform(0, 2 * np.pi, count)


def harmonic_sounds(count: int, length: int, rate: int, rng: np.random.Generator) -> Sounds:
    """Harmonics through two resonances, under an attack and a decay, with low-pass noise."""
    pitch, offset = random_pitches(count, PITCHES, rng)
    highest = 0.45 * rate
    k = np.arange(1, int(highest / PITCHES[0]) + 1)
    frequency = k * pitch[:, None]
    filtered = np.exp(0.3 * rng.standard_normal(frequency.shape)) / np.sqrt(k) * (frequency < highest)
    for low, high in ((250, 900), (900, 1700)):
        centre, width = rng.uniform(low, high, (count, 1)), rng.uniform(150, 400, (count, 1))
        filtered = filtered * centre**2 / (centre**2 - frequency**2 + 1j * width * frequency)
    carrier = np.exp(1j * phases(pitch, offset, length, rate))
    tone, harmonic = np.zeros((count, length)), np.ones_like(carrier)
    for amplitude in filtered.T:
        harmonic *= carrier
        tone += (amplitude[:, None] * harmonic).real
    attack, decay = rng.uniform(0.005, 0.03, (count, 1)), rng.uniform(0.15, 0.6, (count, 1))
    t = np.arange(length) / rate
    envelope = (1 - np.exp(-t / attack)) * np.exp(-t / decay)
    white = rng.standard_normal((count, length + 1))
    breath = (white[:, 1:] + 0.6 * white[:, :-1]) / np.hypot(1, 0.6) * (0.3 + envelope)
    return Sounds(_unit_variance(_unit_variance(tone * envelope) + BREATH * breath), pitch, offset)


def _unit_variance(x: np.ndarray) -> np.ndarray:
    return x / x.std(-1, keepdims=True)


def estimate_pitch(x: np.ndarray, rate: int) -> tuple[float, float]:
    """Pitch in Hz, 60 to 500, and voicing: place and height of the first high peak of the autocorrelation."""
    oversampling = 8  # else the peak of a high pitch can fall between two lags, and that of two periods wins
    power = np.abs(np.fft.rfft(x - x.mean(), 2 * len(x))) ** 2
    correlation = np.fft.irfft(power, 2 * len(x) * oversampling)
    step = rate * oversampling
    lags = np.arange(step // 500, min(step // 60, len(x) * oversampling * 3 // 4))
    # Long lags have fewer terms.
    r = correlation[lags] / (1 - lags / (len(x) * oversampling)) / max(correlation[0], 1e-30)
    is_peak = (r[1:-1] >= r[:-2]) & (r[1:-1] > r[2:]) & (r[1:-1] > 0.85 * r.max())
    if not is_peak.any():
        return float("nan"), 0.0
    i = 1 + int(is_peak.argmax())
    before, peak, after = r[i - 1 : i + 2]
    return step / (lags[i] + 0.5 * (before - after) / (before - 2 * peak + after)), float(peak)


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples between -1 and 1, channels averaged, and the rate; ValueError if it is no 16-bit PCM."""
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise ValueError(f"{8 * file.getsampwidth()} bits a sample instead of 16")
            data = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            return data.reshape(-1, file.getnchannels()).mean(1) / 2**15, file.getframerate()
    except (wave.Error, EOFError) as error:
        raise ValueError(str(error) or "the file ends too early") from error


def write_wav(path: Path, x: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((x.clip(-1, 1) * (2**15 - 1)).round().astype("<i2").tobytes())


def resampled(x: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Band-limited, through the Fourier transform."""
    length = round(len(x) * new_rate / rate)
    return np.fft.irfft(np.fft.rfft(x)[: length // 2 + 1], length) * length / max(len(x), 1) if length > 1 else x[:0]


def sounds_of_folder(folder: Path, length: int, rate: int) -> Sounds:
    """Clips of the WAV files of a folder that overlap by half, without those that are silent or have no pitch."""
    kept, num_silent, num_unvoiced = [], 0, 0
    for path in sorted(p for p in folder.glob("*") if p.suffix.lower() == ".wav"):
        try:
            x = resampled(*read_wav(path), rate)
        except ValueError as error:
            print(f"{path.name} is left out: {error}")
            continue
        for start in range(0, len(x) - length + 1, length // 2):
            clip = x[start : start + length]
            pitch, voicing = estimate_pitch(clip, rate)
            if clip.std() < MIN_LEVEL:
                num_silent += 1
            elif voicing < MIN_VOICING:
                num_unvoiced += 1
            else:
                kept.append((clip, pitch))
    print(f"{folder}: {len(kept)} clips; {num_silent} silent and {num_unvoiced} without a pitch are left out")
    if len(kept) < MIN_CLIPS:
        raise SystemExit(
            f"{folder} has {len(kept)} usable clips, and {MIN_CLIPS} are needed: give WAV files of 16-bit PCM, with "
            f"notes or vowels of at least {length / rate:.2f} s"
        )
    x, pitch = _unit_variance(np.stack([clip for clip, _ in kept])), np.array([pitch for _, pitch in kept])
    fundamental = (x * np.exp(-1j * phases(pitch, np.zeros(len(x)), length, rate))).sum(-1)
    return Sounds(x, pitch, np.angle(fundamental))


def spectrogram(x: Tensor, rate: int) -> Tensor:
    """Power ``(n, frequencies, frames)`` in windows of about 32 ms; 1 everywhere for white noise of variance 1."""
    size = 2 ** round(np.log2(0.032 * rate))
    window = torch.hann_window(size, device=x.device)
    return torch.stft(x, size, size // 2, window=window, return_complex=True).abs() ** 2 / window.square().sum()


def log_spectral_distance(a: Tensor, b: Tensor, rate: int) -> float:
    """Root mean square over frequencies of the difference in dB, averaged over frames and sounds."""
    a, b = (10 * torch.log10(spectrogram(x, rate) + FLOOR) for x in (a, b))
    return (a - b).square().mean(1).sqrt().mean().item()


def spectral_loss(sounds: Tensor, rate: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Of spectra averaged over time, in amplitude, where loud sounds do not outweigh all others as in power."""

    def amplitude(x: Tensor) -> Tensor:
        return (spectrogram(x, rate).mean(-1) + FLOOR).sqrt()

    target = amplitude(sounds)
    weight = SPECTRAL_WEIGHT / target.square().sum(-1).mean()
    return lambda x, rows: weight * (amplitude(x) - target[rows]).square().sum(-1).mean()


def stage(args: argparse.Namespace, width: int, univariate: Affine) -> Autoregressive:
    return Autoregressive(
        (args.length,),
        univariate,
        conditioner=partial(CausalConv, kernel_size=3, dilation_cycle=args.blocks),
        hidden_dims=[width] * args.blocks,
        context_dim=(3, args.length),
    )


def make_flows(args: argparse.Namespace) -> tuple[pf.Flow, pf.Flow]:
    """Teacher and student; the scale of all samples is one, so that nothing depends on where in a clip they stand."""
    scale = Standardize(args.length, scale=torch.ones(args.length))
    # A sample is known from those before it to within far less than the 0.14 sd of the default bound.
    teacher = pf.Flow([stage(args, args.width, Affine(max_expansion=6.0)).inv, scale])
    student = pf.Flow([*(stage(args, args.student_width, Affine()) for _ in range(NUM_STAGES)), scale])
    return teacher.to(args.device), student.to(args.device)


def seconds(run: Callable[[], Tensor], repeats: int) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run().cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def pitch_errors(x: Tensor, pitch: np.ndarray, rate: int) -> np.ndarray:
    found = np.array([estimate_pitch(row, rate)[0] for row in x.double().cpu().numpy()])
    return np.nan_to_num(np.abs(found / pitch - 1), nan=1.0)


@torch.no_grad()
def compare(
    teacher: pf.Flow, student: pf.Flow, context: Tensor, pitch: np.ndarray, rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """Print pitches, distances and speeds at contexts not seen before; return the sounds of teacher and student."""
    (slow, again), (fast, fast_again) = ([flow(context).sample() for _ in range(2)] for flow in (teacher, student))
    for name, x in (("teacher", slow), ("student", fast)):
        errors = pitch_errors(x, pitch, rate)
        share = f"{(errors < 0.02).sum()} of {len(errors)} sounds within 2 %, the worst off by {errors.max():.2%}"
        print(f"pitch of the {name}: {share}")
    within, between, own = (
        log_spectral_distance(a, b, rate) for a, b in ((slow, again), (fast, slow), (fast, fast_again))
    )
    print(f"log-spectral distance of student and teacher: {between:.2f} dB, {between / within:.2f} times that of two")
    print(f"    draws of the teacher, {within:.2f} dB; of two draws of the student: {own:.2f} dB")
    z = teacher.base().sample(context.shape[:1])
    x, _ = teacher(context).transport(z)
    error = (teacher(context).latent(x) - z).abs().max().item()
    print(f"the noise of the teacher's sounds, back from one full pass, is off by at most {error:.1e}")
    for count in (1, len(context)):
        part = context[:count]
        times = seconds(teacher(part).sample, 2), seconds(student(part).sample, 5)
        print(
            f"{count} sounds at once: teacher {times[0]:.3f} s, student {times[1]:.4f} s, "
            f"{times[0] / times[1]:.1f} times as fast"
        )
    return slow.cpu().numpy(), fast.cpu().numpy()


def draw(sounds: dict[str, np.ndarray], pitch: np.ndarray, rate: int) -> plt.Figure:
    """Spectrograms of teacher and student, and 25 ms of waveform, of four pitches from low to high."""
    columns = np.argsort(pitch)[np.linspace(0, len(pitch) - 1, 4).astype(int)]
    figure, grid = plt.subplots(3, 4, figsize=(10, 6.6), sharex="row", sharey="row", layout="constrained")
    length = next(iter(sounds.values())).shape[-1]
    middle = np.arange(length // 2, min(length // 2 + rate // 40, length))
    size = 2 ** round(np.log2(0.05 * rate))
    for i, axes in zip(columns, grid.T, strict=True):
        axes[0].set_title(f"{pitch[i]:.0f} Hz")
        for row, x in enumerate(sounds.values()):
            axes[row].specgram(
                x[i], NFFT=size, Fs=rate, noverlap=size - size // 16, pad_to=4 * size, vmin=-75, vmax=-20, cmap="magma"
            )
            axes[2].plot(1000 * middle / rate, x[i, middle] - 8 * row, linewidth=1)
        axes[1].set_xlabel("s")
        axes[2].set(xlabel="ms")
    for row, name in enumerate(sounds):
        grid[row, 0].set_ylabel(f"{name}\nHz")
    grid[2, 0].set_yticks([-8 * row for row in range(len(sounds))], sounds)
    return figure


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    size = args.length, args.rate
    if args.wav_folder:
        sounds = sounds_of_folder(args.wav_folder, *size)
    else:
        sounds = harmonic_sounds(args.num_sounds, *size, rng)
    x = torch.as_tensor(sounds.x, dtype=torch.float32, device=args.device)
    context = conditioning(sounds.pitch, sounds.offset, *size).to(args.device)
    teacher, student = make_flows(args)
    options = {"batch_size": BATCH_SIZE, "seed": args.seed, "progress_bar": not args.no_progress_bar}

    adam = partial(torch.optim.Adam, lr=1e-2)
    fit = pf.fit_density(teacher, x, context, max_epochs=args.max_epochs, optimizer=adam, **options)
    print(f"teacher: {fit.best_log_prob / args.length:.3f} nats a sample, {time.perf_counter() - start:.0f} s")
    distillation = pf.distill(
        student,
        teacher,
        context,
        num_steps=args.num_steps,
        warm_start=args.warm_start,
        penalty=spectral_loss(x, args.rate),
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        compile="none",  # nothing is gained beside convolutions
        **options,
    )
    print(f"student: KL {distillation.kl / args.length:.3f} nats a sample, {time.perf_counter() - start:.0f} s")

    pitch, offset = random_pitches(NUM_TESTED, tuple(np.quantile(sounds.pitch, [0, 1])), rng)
    drawn = compare(teacher, student, conditioning(pitch, offset, *size).to(args.device), pitch, args.rate)

    args.output.mkdir(parents=True, exist_ok=True)
    paths = [args.output / f"parallel_wavenet_{name}" for name in ("teacher.wav", "student.wav", "spectrograms.png")]
    from_low_to_high = np.argsort(pitch)[::5]
    for path, made in zip(paths[:2], drawn, strict=True):
        write_wav(path, 0.2 * made[from_low_to_high].ravel(), args.rate)
    draw(dict(zip(("teacher", "student"), drawn, strict=True)), pitch, args.rate).savefig(paths[2], dpi=DPI)
    print("\n".join(f"saved {path}" for path in paths) + f"\n{time.perf_counter() - start:.0f} s in all")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sounds from a WaveNet and from a student that draws them in one pass")
    parser.add_argument("--wav-folder", type=Path, help="of WAV files to learn from (default: sounds made here)")
    parser.add_argument("--num-sounds", type=int, default=4000, help="that are made (default: 4000)")
    parser.add_argument("--rate", type=int, default=4000, help="samples a second (default: 4000)")
    parser.add_argument("--length", type=int, default=1024, help="of a sound, in samples (default: 1024)")
    parser.add_argument("--width", type=int, default=16, help="of the teacher's network (default: 16)")
    parser.add_argument("--student-width", type=int, default=8, help="of the student's four (default: 8)")
    parser.add_argument("--blocks", type=int, default=7, help="of each network, dilated 1, 2, 4, ... (default: 7)")
    parser.add_argument("--max-epochs", type=int, default=6, help="of the teacher (default: 6)")
    parser.add_argument("--warm-start", type=int, default=400, help="steps of regression of the student (default: 400)")
    parser.add_argument("--num-steps", type=int, default=500, help="of distillation (default: 500)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the results (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parsed())
