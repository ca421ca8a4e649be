"""Which model a teacher is, and where its weights come from; the teachers of the papers by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from annotate.cells import TeacherError

Weights = Literal["pretrained", "checkpoint", "random"]

_ALLOWED = (
    "allowed are weights='pretrained' (--pretrained), checkpoint=FILE (--checkpoint), weights='random' with a seed (to "
    "try things out), and the names hf-hub:OWNER/MODEL and local-dir:FOLDER, which bring their own"
)


@dataclass(frozen=True)
class TeacherSpec:
    """One model of a teacher. Says everything that is needed to load it, and can be sent to another process.

    Attributes:
        name: a model of timm, with a tag ("dm_nfnet_f6.dm_in1k") or without (timm's default tag), or a model that timm
            finds elsewhere: "hf-hub:OWNER/MODEL", "local-dir:FOLDER".
        weights: where the weights come from. Left out, it follows from `checkpoint`, from `seed`, or from a name that
            brings its own weights.
        checkpoint: file with the weights, for weights="checkpoint".
        seed: of the random weights, for weights="random".
        image_size: side in pixels of the square images that the model gets; None for the size that its own
            configuration gives for evaluation.

    Raises:
        TeacherError: it is not clear where the weights come from, or two settings contradict each other.
    """

    name: str
    weights: Weights | None = None
    checkpoint: Path | None = None
    seed: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        weights = self.weights or self._implied_weights()
        if weights not in ("pretrained", "checkpoint", "random"):
            found = "nothing says where the weights come from" if weights is None else f"got weights={weights!r}"
            raise TeacherError(f"{self.name}: {found}; {_ALLOWED}")
        for given, value, needed_by in (("checkpoint", self.checkpoint, "checkpoint"), ("seed", self.seed, "random")):
            if (value is None) == (weights == needed_by):
                problem = "needs" if value is None else "does not go with"
                raise TeacherError(f"{self.name}: weights={weights!r} {problem} a {given}; {_ALLOWED}")
        if self.image_size is not None and self.image_size < 1:
            raise TeacherError(f"{self.name}: image_size is a side in pixels, at least 1, got {self.image_size}")
        object.__setattr__(self, "weights", weights)
        # Another process may have another working directory.
        if self.name.startswith("local-dir:"):
            folder = Path(self.name.removeprefix("local-dir:")).absolute()
            object.__setattr__(self, "name", f"local-dir:{folder}")
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", Path(self.checkpoint).absolute())

    @property
    def weights_shown(self) -> str:
        """The origin of the weights in words, without the folder that a checkpoint happens to be in."""
        if self.checkpoint is not None:
            return f"checkpoint {self.checkpoint.name}"
        return f"random, seed {self.seed}" if self.weights == "random" else "pretrained"

    def _implied_weights(self) -> Weights | None:
        if self.checkpoint is not None:
            return "checkpoint"
        if self.seed is not None:
            return "random"
        return "pretrained" if self.name.startswith(("hf-hub:", "local-dir:")) else None


# Token Labeling (arXiv 2104.10858), section 4.2 and figure 4: NFNet-F6 at 576 px for its main results, the others for
# its study of annotators. All but L2 saw no images beyond ImageNet-1k, and each tag is the one that timm loaded for
# the plain name when the paper appeared (B3 at 81.6 %). timm's defaults have since moved to weights with extra data.
# L2 (JFT-300M, 88.2 %, at 475 px) is the annotator of ReLabel (arXiv 2101.05022).
PRESETS: dict[str, tuple[str, int]] = {
    "dm_nfnet_f6": ("dm_nfnet_f6.dm_in1k", 576),
    "tf_efficientnet_b3": ("tf_efficientnet_b3.aa_in1k", 300),
    "tf_efficientnet_b4": ("tf_efficientnet_b4.aa_in1k", 380),
    "tf_efficientnet_b5": ("tf_efficientnet_b5.ra_in1k", 456),
    "tf_efficientnet_b6": ("tf_efficientnet_b6.aa_in1k", 528),
    "tf_efficientnet_b7": ("tf_efficientnet_b7.ra_in1k", 600),
    "tf_efficientnet_b8": ("tf_efficientnet_b8.ra_in1k", 672),
    "tf_efficientnet_l2": ("tf_efficientnet_l2.ns_jft_in1k_475", 475),
    "resnest269e": ("resnest269e.in1k", 416),
}
"""Name in the papers -> timm's name with its tag, and the side of the images in pixels."""


def preset(name: str, *, image_size: int | None = None) -> TeacherSpec:
    """A teacher of the papers with its published weights, at its published size or at another one.

    Raises:
        TeacherError: there is no such preset.
    """
    if name not in PRESETS:
        raise TeacherError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    full_name, published_size = PRESETS[name]
    return TeacherSpec(full_name, weights="pretrained", image_size=published_size if image_size is None else image_size)
