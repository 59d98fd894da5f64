"""Say why a model cannot run for many draws at once, and how it could."""

from collections.abc import Mapping

from pyroflows.models.lines import line_of_error

_WHERE = "torch.where(x > 0, a, b) for a if x > 0 else b"
_TENSORS = "torch.stack([a, b]) for torch.tensor([a, b]), and tensors without .item(), float(), int() and NumPy"
# What to write instead, by words of the error; the first that fit. The last holds for all models.
_ADVICE = (
    ("factorisation", "factor, info = torch.linalg.cholesky_ex(K), and if info > 0 for try and except"),
    ("paths", _WHERE),
    ("conditions", _WHERE),
    ("control flow", _WHERE),
    ("dynamic shape", "torch.where(mask, x, 0.0) for x[mask] where the mask depends on latents"),
    ("masked_select", "torch.where(mask, x, 0.0) for x[mask] where the mask depends on latents"),
    (".item()", _TENSORS),
    ("data pointer", _TENSORS),
    ("", "(X * b).sum(-1) for X @ b, x[..., 0] for x[0], and x[..., None] where a scalar meets a vector"),
)


def failure(error: Exception) -> str:
    """Describe an error, and the line of the model that led to it, as a part of a sentence."""
    first_sentence = str(error).partition("\n")[0].partition(". ")[0]
    return f"fails{line_of_error(error)} with [{type(error).__name__}: {first_sentence}]"


def how_to_speed_up(failures: Mapping[str, str]) -> str:
    """Say why a model runs draw by draw, and what to change.

    Args:
        failures: what went wrong, by way of running.

    Example:
        >>> failures = {"plate": "differs from single draws", "vmap": "fails with [RuntimeError: vmap: .item()]"}
        >>> words = how_to_speed_up(failures)
        >>> print(words.partition(". ")[0])
        under vmap it fails with [RuntimeError: vmap: .item()], and under an outer plate it differs from single draws
        >>> "Write torch.stack([a, b]) for torch.tensor([a, b])" in words
        True
    """
    # The way "paths" gets furthest, and its error is what there is to change.
    last = failures.get("paths", failures["vmap"])
    advice = next(advice for words, advice in _ADVICE if words in last)
    return (
        f"under vmap it {last}, and under an outer plate it {failures['plate']}. Write {advice}; docs/models.md of "
        "pyroflows shows how models run for many draws at once"
    )


def refuted(mode: str, seconds: float) -> str:
    """Say that a way of running was found to be wrong at the draws of a fit, and what to change.

    Args:
        mode: the way of running.
        seconds: how long a run for one draw takes.
    """
    return (
        f"at some draws the model has another log-density in a batch (mode '{mode}') than alone, so that some steps of "
        "the fit were wrong: it runs draw by draw from now on, and all figures are those of such runs, each of which "
        f"takes about {duration(seconds)}. A batch takes one branch on latents that are read by .numpy(), .tolist(), "
        ".any() or torch.allclose for all of its draws: write torch.where(x > 0, a, b) for a if x > 0 else b, and fit "
        "again; docs/models.md of pyroflows shows how models run for many draws at once"
    )


def duration(seconds: float) -> str:
    """Say how long something takes, roughly.

    Example:
        >>> duration(0.0123), duration(75.4)
        ('12 milliseconds', '75 seconds')
    """
    return f"{1000 * seconds:.2g} milliseconds" if seconds < 1 else f"{seconds:.0f} seconds"
