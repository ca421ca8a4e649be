"""Which rule belongs to which kind of block, and how blocks are run by their rules.

A rule is a function of a block, its input and the labels of its tokens. It does what the block's own `forward` does,
with the block's own layers, and moves the labels along. Forward hooks on blocks and their attention are not called.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from timm.models import checkpoint
from torch import Tensor, nn

from tokenlabels.align.attention import Backend
from tokenlabels.align.operations import residual


class AlignmentError(ValueError):
    """Labels cannot follow the tokens of a model; the message names the module and what to do."""


@dataclass(frozen=True)
class Alignment:
    """How labels follow tokens.

    Attributes:
        backend: of attention; None takes the fastest of the device.
        layers: numbers of the blocks that labels follow, counted from 0 over all stages; None is all. Others leave
            labels as they are.
        normalize: whether a block's labels are the average with the residual (equation 11). Otherwise they are what
            attention or spatial mixing brings, alone.
        centred: see `tokenlabels.align.attention.attend`.
        seen: is told the tokens and labels after every block.
    """

    backend: Backend | None = None
    layers: frozenset[int] | None = None
    normalize: bool = True
    centred: bool = True
    seen: Callable[[Tensor, Tensor], None] | None = field(default=None, compare=False)

    def combine(self, labels: Tensor, moved: Tensor) -> Tensor:
        """Labels behind a residual connection around what moved them."""
        return residual(labels, moved) if self.normalize else moved


Rule = Callable[..., tuple[Tensor, Tensor]]
"""``rule(alignment, block, x, labels, *args)``, where ``block(x, *args)`` is the block's forward. Tokens are laid out
as the block takes them; labels are float32 [B, N, C] or [B, H, W, C]."""

RuleType = TypeVar("RuleType", bound=Rule)

BLOCK_RULES: dict[type[nn.Module], Rule] = {}
CHECKS: dict[type[nn.Module], Callable[[Any], None]] = {}


def block_rule(*kinds: type[nn.Module], check: Callable[[Any], None] | None = None) -> Callable[[RuleType], RuleType]:
    """Register a rule for blocks of exactly these types: a subclass may do something else.

    Args:
        kinds: of blocks.
        check: raises `AlignmentError` for a block whose parts the rule does not know.
    """

    def register(rule: RuleType) -> RuleType:
        for kind in kinds:
            BLOCK_RULES[kind] = rule
            if check is not None:
                CHECKS[kind] = check
        return rule

    return register


def check_block(block: nn.Module) -> None:
    """Refuse a block without a rule.

    Raises:
        AlignmentError: the type of the block, or of a part of it, is not known.
    """
    rule_of(block)
    check = CHECKS.get(type(block))
    if check is not None:
        check(block)


def rule_of(block: nn.Module) -> Rule:
    """The rule of a block.

    Raises:
        AlignmentError: there is none.
    """
    rule = BLOCK_RULES.get(type(block))
    if rule is None:
        known = ", ".join(sorted(full_name(kind) for kind in BLOCK_RULES))
        raise AlignmentError(
            f"labels cannot follow the tokens through {full_name(type(block))}: it has no rule. Rules are there for "
            f"{known}; write one and mark it with tokenlabels.align.rules.block_rule"
        )
    return rule


def check_part(part: nn.Module, *known: type[nn.Module], of: nn.Module) -> None:
    """Refuse a part of a block that is of none of these very types."""
    if type(part) not in known:
        names = ", ".join(map(full_name, known))
        raise AlignmentError(
            f"labels cannot follow the tokens through {full_name(type(part))} in {full_name(type(of))}: the rule of "
            f"this block knows {names}; build the model with one of them, or write a rule (block_rule)"
        )


def full_name(kind: type) -> str:
    """Module and name: Swin v1 and v2 call their parts alike."""
    return f"{kind.__module__}.{kind.__qualname__}"


def run_blocks(
    alignment: Alignment,
    blocks: Iterable[nn.Module],
    x: Tensor,
    labels: Tensor,
    *args: Any,
    first: int = 0,
    checkpointing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens and labels behind these blocks.

    Args:
        alignment: how labels follow.
        blocks: of one stage.
        x, labels: before them.
        args: further arguments of every block.
        first: number of the first of them.
        checkpointing: whether activations are computed again in backward.
    """
    for number, block in enumerate(blocks, start=first):
        if alignment.layers is None or number in alignment.layers:
            step = partial(rule_of(block), alignment, block)
            x, labels = checkpoint(step, x, labels, *args) if checkpointing else step(x, labels, *args)
        else:
            x = checkpoint(block, x, *args) if checkpointing else block(x, *args)
        if alignment.seen is not None:
            alignment.seen(x, labels)
    return x, labels
