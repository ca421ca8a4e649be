"""Slow, obvious twins of `tokenlabels.align`: every model's rule as explicit matrices over tokens, in float64.

The whole label embedding Y [B, T, K] goes through the operations of TL-Align's Table 10. Nothing here comes from the
package. What the tokens are is read off the plain model by hooks; what moves them is worked out again.

Legend: B images, P prefix tokens, N = h x w patch tokens, T = P + N, M keys, K classes, D channels.
"""

import copy
import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


def norm(rows: Tensor) -> Tensor:
    """Norm of Table 10: every row sums to 1."""
    return rows / rows.sum(dim=-1, keepdim=True)


def patch_labels(own: Tensor, partner: Tensor, labels: Tensor, image_size: Grid, grid: Grid) -> Tensor:
    """Equation 5 on pixels, patch by patch: [B, h, w] of the plan, labels [B, K] -> [B, h * w, K]."""
    mask = own.double()
    for dim, side in enumerate(image_size, start=1):
        mask = mask.repeat_interleave(side // own.shape[dim], dim=dim)
    rows, columns = image_size[0] // grid[0], image_size[1] // grid[1]
    embedding = torch.zeros(len(own), *grid, labels.shape[1], dtype=torch.float64)
    for b, i, j in product(range(len(own)), range(grid[0]), range(grid[1])):
        share = mask[b, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].mean()
        embedding[b, i, j] = share * labels[b] + (1 - share) * labels[partner[b]]
    return embedding.flatten(1, 2)


def prefix_labels(own: Tensor, partner: Tensor, labels: Tensor, num_prefix_tokens: int) -> Tensor:
    """Equation 5 for the class token, register tokens and so on: [B, P, K]."""
    share = own.double().mean(dim=(1, 2))[:, None]
    image = share * labels + (1 - share) * labels[partner]
    return image[:, None].repeat(1, num_prefix_tokens, 1)


def inputs_of(model: nn.Module, images: Tensor, modules: Iterable[nn.Module]) -> list[tuple[Any, ...]]:
    """What each of the modules is called with when the model sees the images."""
    modules = list(modules)
    calls: list[tuple[Any, ...]] = []
    handles = [module.register_forward_pre_hook(lambda _, args: calls.append(args)) for module in modules]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(modules)
    return calls


def softmax_matrix(q: Tensor, k: Tensor, num_heads: int, scale: float) -> Tensor:
    """Mean over heads of softmax attention, q [B, N, D] and k [B, M, D] -> [B, N, M]."""
    width = q.shape[-1] // num_heads
    matrices = []
    for head in range(num_heads):
        channels = slice(head * width, (head + 1) * width)
        exponents = scale * torch.einsum("bnd,bmd->bnm", q[..., channels], k[..., channels])
        weights = (exponents - exponents.amax(dim=-1, keepdim=True)).exp()
        matrices.append(norm(weights))
    return sum(matrices) / num_heads


def move(labels: Tensor, matrix: Tensor) -> Tensor:
    """Spatial mixing, ``Norm(W) Y``."""
    return norm(matrix) @ labels


def window_matrix(grid: Grid, kernel: Grid, stride: Grid, padding: Grid) -> tuple[Tensor, Grid]:
    """Spatial aggregation: which tokens each window of a convolution reads, [M, N] of zeros and ones."""
    out = tuple((grid[d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in range(2))
    reads = torch.zeros(*out, *grid, dtype=torch.float64)
    for i, j, di, dj in product(*map(range, out), *map(range, kernel)):
        row, column = i * stride[0] - padding[0] + di, j * stride[1] - padding[1] + dj
        if 0 <= row < grid[0] and 0 <= column < grid[1]:
            reads[i, j, row, column] = 1
    return reads.flatten(2).flatten(0, 1), (out[0], out[1])


def conv_matrix(grid: Grid, conv: nn.Conv2d) -> Tensor:
    """A depthwise convolution as a matrix over tokens, [N, N]: the mean of all kernels' absolute values."""
    weights = conv.weight.detach().abs().mean(dim=(0, 1))
    centre = [side // 2 for side in weights.shape]
    matrix = torch.zeros(*grid, *grid, dtype=torch.float64)
    for i, j, di, dj in product(*map(range, grid), *map(range, weights.shape)):
        row, column = i + di - centre[0], j + dj - centre[1]
        if 0 <= row < grid[0] and 0 <= column < grid[1]:
            matrix[i, j, row, column] = weights[di, dj]
    return matrix.flatten(2).flatten(0, 1)


class Twin:
    """A model's labels by brute force.

    Args:
        model: the plain one, in training mode and without dropout; a copy is taken.
        images: [B, 3, H_px, W_px], mixed.
        own, partner: of the plan.
        labels: [B, K], of the images before mixing.
    """

    def __init__(self, model: nn.Module, images: Tensor, own: Tensor, partner: Tensor, labels: Tensor) -> None:
        self.model: Any = copy.deepcopy(model).double()
        self.images, self.own, self.partner, self.labels = images.double(), own, partner, labels.double()

    def patches(self, grid: Grid) -> Tensor:
        size = (self.images.shape[2], self.images.shape[3])
        return patch_labels(self.own, self.partner, self.labels, size, grid)

    @torch.no_grad()
    def vit(self) -> tuple[Tensor, Tensor]:
        """Labels of what is classified [B, K], and of patch tokens [B, N, K]."""
        model = self.model
        patch = model.patch_embed.patch_size
        grid = (self.images.shape[2] // patch[0], self.images.shape[3] // patch[1])
        num_prefix = model.num_prefix_tokens
        y = torch.cat([prefix_labels(self.own, self.partner, self.labels, num_prefix), self.patches(grid)], dim=1)
        for matrix in self.vit_matrices():
            y = norm(y + move(y, matrix))
        tokens = y[:, num_prefix:]
        if model.global_pool == "token":
            return y[:, 0], tokens
        return (y if model.pool_include_prefix else tokens).mean(dim=1), tokens

    @torch.no_grad()
    def vit_matrices(self) -> list[Tensor]:
        """The attention of every block, [B, T, T], mean over heads."""
        attentions = [block.attn for block in self.model.blocks]
        inputs = inputs_of(self.model, self.images, attentions)
        return [self.vit_matrix(attn, x) for attn, (x, *_) in zip(attentions, inputs, strict=True)]

    def vit_matrix(self, attn: Any, x: Tensor) -> Tensor:
        width = x.shape[-1]
        bias = torch.zeros(3 * width) if attn.qkv.bias is None else attn.qkv.bias
        q, k = (x @ attn.qkv.weight[part].T + bias[part] for part in (slice(0, width), slice(width, 2 * width)))
        per_head = (len(x), -1, attn.num_heads, attn.head_dim)
        q, k = attn.q_norm(q.reshape(per_head)).flatten(2), attn.k_norm(k.reshape(per_head)).flatten(2)
        return softmax_matrix(q, k, attn.num_heads, 1 / math.sqrt(attn.head_dim))

    @torch.no_grad()
    def swin(self) -> tuple[Tensor, Tensor]:
        model = self.model
        blocks = [block for stage in model.layers for block in stage.blocks]
        inputs = iter(inputs_of(model, self.images, blocks))
        grid = (self.images.shape[2] // 4, self.images.shape[3] // 4)
        y = self.patches(grid)
        for stage in model.layers:
            if not isinstance(stage.downsample, nn.Identity):
                y, grid = merge(y, grid)
            for block in stage.blocks:
                (x,) = next(inputs)
                assert x.shape[1:3] == grid
                y = norm(y + move(y, swin_matrix(block, x)))
        return y.mean(dim=1), y

    @torch.no_grad()
    def pvt(self) -> tuple[Tensor, Tensor]:
        model = self.model
        attentions = [block.attn for stage in model.stages for block in stage.blocks]
        queries = iter(inputs_of(model, self.images, [attn.q for attn in attentions]))
        keys = iter(inputs_of(model, self.images, [attn.kv for attn in attentions]))
        grid = (self.images.shape[2] // 4, self.images.shape[3] // 4)
        y = self.patches(grid)
        for stage in model.stages:
            if stage.downsample is not None:
                reads, grid = window_matrix(grid, (3, 3), (2, 2), (1, 1))
                y = move(y, reads)
            for block in stage.blocks:
                attn = block.attn
                q = attn.q(next(queries)[0])
                k = attn.kv(next(keys)[0])[..., : attn.dim]
                weights = softmax_matrix(q, k, attn.num_heads, 1 / math.sqrt(attn.head_dim))
                y = norm(y + move(move(y, pvt_keys(attn, grid)), weights))
                y = norm(y + move(y, conv_matrix(grid, block.mlp.dwconv)))
        return y.mean(dim=1), y

    @torch.no_grad()
    def mixer(self) -> tuple[Tensor, Tensor]:
        y = self.patches((self.images.shape[2] // 8, self.images.shape[3] // 8))
        for block in self.model.blocks:
            hidden = move(y, block.mlp_tokens.fc1.weight.abs())
            y = norm(y + move(hidden, block.mlp_tokens.fc2.weight.abs()))
        return y.mean(dim=1), y

    @torch.no_grad()
    def convnext(self) -> tuple[Tensor, Tensor]:
        grid = (self.images.shape[2] // 4, self.images.shape[3] // 4)
        y = self.patches(grid)
        for stage in self.model.stages:
            if not isinstance(stage.downsample, nn.Identity):
                reads, grid = window_matrix(grid, (2, 2), (2, 2), (0, 0))
                y = move(y, reads)
            for block in stage.blocks:
                y = norm(y + move(y, conv_matrix(grid, block.conv_dw)))
        return y.mean(dim=1), y


def merge(labels: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Patch merging: sums over 2 x 2 tokens, of those that there are at an odd border, then Norm."""
    out = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
    sums = torch.zeros(len(labels), *out, labels.shape[-1], dtype=labels.dtype)
    for i, j in product(*map(range, grid)):
        sums[:, i // 2, j // 2] += labels[:, i * grid[1] + j]
    return norm(sums.flatten(1, 2)), out


def pvt_keys(attn: Any, grid: Grid) -> Tensor:
    """Which tokens each key is made of, [M, N]."""
    if attn.pool is not None:
        reads = torch.zeros(7, 7, *grid, dtype=torch.float64)
        for i, j in product(range(7), range(7)):
            rows = slice(i * grid[0] // 7, math.ceil((i + 1) * grid[0] / 7))
            columns = slice(j * grid[1] // 7, math.ceil((j + 1) * grid[1] / 7))
            reads[i, j, rows, columns] = 1
        return reads.flatten(2).flatten(0, 1)
    if attn.sr is None:
        return torch.eye(grid[0] * grid[1], dtype=torch.float64)
    side = attn.sr.kernel_size
    return window_matrix(grid, side, side, (0, 0))[0]


def swin_matrix(block: Any, x: Tensor) -> Tensor:
    """Attention in shifted windows as a matrix over all tokens, x [B, h, w, D] -> [B, N, N].

    Windows are lists of places on the shifted and padded grid. A place is a token or, beyond the grid, padding, whose
    features are zero and whose column is left out.
    """
    height, width = x.shape[1:3]
    (rows, columns), (down, right) = block.window_size, block.shift_size
    padded = (math.ceil(height / rows) * rows, math.ceil(width / columns) * columns)
    tokens = x if "v2" in type(block).__module__ else block.norm1(x)
    matrix = torch.zeros(len(x), height * width, height * width, dtype=torch.float64)

    def source(row: int, column: int) -> int | None:
        if row >= height or column >= width:
            return None
        return (row + down) % height * width + (column + right) % width

    def region(row: int, column: int) -> tuple[int, int]:
        """Places that were neighbours before the shift; 0 is the inner part, 2 came round from the other side."""
        sides = zip((row, column), padded, (rows, columns), (down, right), strict=True)
        if not (down or right):
            return (0, 0)
        found = [2 if place >= end - shift else int(place >= end - window) for place, end, window, shift in sides]
        return (found[0], found[1])

    for top, left in product(range(0, padded[0], rows), range(0, padded[1], columns)):
        places = list(product(range(top, top + rows), range(left, left + columns)))
        sources = [source(*place) for place in places]
        features = torch.zeros(len(x), len(places), x.shape[-1], dtype=torch.float64)
        for number, token in enumerate(sources):
            if token is not None:
                features[:, number] = tokens.flatten(1, 2)[:, token]
        mask = torch.tensor([[0.0 if region(*a) == region(*b) else -100.0 for b in places] for a in places])
        weights = window_weights(block.attn, features, places, mask.double())
        for a, b in product(range(len(places)), repeat=2):
            if sources[a] is not None and sources[b] is not None:
                matrix[:, sources[a], sources[b]] = weights[:, a, b]
    return matrix


def window_weights(attn: Any, x: Tensor, places: list[Grid], mask: Tensor) -> Tensor:
    """Mean over heads of the attention in one window, [B, A, D] -> [B, A, A]."""
    is_v2 = hasattr(attn, "logit_scale")
    dim, width = x.shape[-1], x.shape[-1] // attn.num_heads
    bias = torch.cat([attn.q_bias, torch.zeros(dim, dtype=x.dtype)]) if is_v2 else attn.qkv.bias
    biases = position_biases(attn)
    total = 0
    for head in range(attn.num_heads):
        q, k = (
            x @ attn.qkv.weight[first : first + width].T + bias[first : first + width]
            for first in (head * width, dim + head * width)
        )
        if is_v2:
            q, k = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12), k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            scale = min(float(attn.logit_scale[head].exp()), 100.0)
        else:
            scale = 1 / math.sqrt(width)
        position = [[float(biases[a[0] - b[0], a[1] - b[1]][head]) for b in places] for a in places]
        exponents = scale * q @ k.transpose(1, 2) + torch.tensor(position, dtype=torch.float64) + mask
        total = total + exponents.softmax(dim=-1)
    return total / attn.num_heads


def position_biases(attn: Any) -> dict[Grid, Tensor]:
    """[heads] by offset between two places: of the learned table (v1), or the network over log-spaced offsets (v2)."""
    rows, columns = attn.window_size
    biases: dict[Grid, Tensor] = {}
    for down, right in product(range(1 - rows, rows), range(1 - columns, columns)):
        if hasattr(attn, "logit_scale"):
            scaled = [8 * down / max(rows - 1, 1), 8 * right / max(columns - 1, 1)]
            logs = [math.copysign(math.log2(abs(s) + 1) / math.log2(8), s) for s in scaled]
            biases[down, right] = 16 / (1 + (-attn.cpb_mlp(torch.tensor(logs, dtype=torch.float64))).exp())
        else:
            entry = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
            biases[down, right] = attn.relative_position_bias_table[entry]
    return biases
