"""LaRoSA (arXiv 2507.01299) as a ``torch.compile`` backend: rotated Top-K activation sparsity, no retraining."""

from pathlib import Path

# In a checkout passes/ and kernels/ stand beside this package, in a wheel inside it. Appending the root makes
# ``larosa_fx.passes`` and ``larosa_fx.kernels`` their only names in both.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))

__version__ = "0.1.0"

from larosa_fx.compiler.backend import last_report, reports  # noqa: E402  after __path__, which these imports need
from larosa_fx.compiler.folds import refold  # noqa: E402
from larosa_fx.compiler.policy import LarosaError  # noqa: E402
from larosa_fx.enable import disable, enable  # noqa: E402
from larosa_fx.generation import compile_config, generate  # noqa: E402
from larosa_fx.method.calibrate import calibrate  # noqa: E402
from larosa_fx.method.evaluate import perplexity  # noqa: E402
from larosa_fx.packing import load, pack  # noqa: E402
from larosa_fx.plan.plan import Plan, PlanError  # noqa: E402
from larosa_fx.training.loop import TrainingOptions, train  # noqa: E402

__all__ = ["LarosaError", "Plan", "PlanError", "TrainingOptions", "calibrate", "compile_config", "disable", "enable",
           "generate", "last_report", "load", "pack", "perplexity", "refold", "reports", "train"]
