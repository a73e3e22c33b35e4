"""The selective scan of Mamba-1 over segments: a running summary with a fading memory.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        one h of n numbers for each channel
    y_t = <C_t, h_t> + D u_t,   then   y_t * silu(z_t)

Letters: N rows, S segments, E channels, n states a channel. dt goes through softplus with its bias
here. Accumulates in float32 (float64 for float64 inputs). Source: Gu and Dao 2023 (Mamba), section
3; the gate and D as in the released Hymba code.

`selective_scan_reference` is that recurrence, token by token. `selective_scan_chunked` is the same
function, fast on a CPU: rows are cut in chunks, all chunks walk side by side, so Python takes
Q + N/Q steps instead of N. A chunk first runs from zero to learn what it adds to the state, the
chunks are chained, then each runs again from its true state. Only products of decays are formed,
never a division by one, so it is safe for any A and dt. Backward is written by hand: it keeps one
state a chunk and recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.segments import Segments

# Elements (chunks x states x channels) that one step of all chunks should touch: enough to hide
# the cost of a torch call, small enough for the second-level caches. See bench/scan.py.
STEP_ELEMENTS = 1 << 19
# Elements that backward may hold while it walks one block of channels.
BLOCK_ELEMENTS = 1 << 24


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u, dt, z (N, E); A (E, n); B, C (N, n); D, dt_bias (E); initial_state (S or 1, E, n).

    Returns y (N, E) in u's dtype and the state after each segment (S, E, n)."""
    x, delta, A, B, C, state = _promote(u, dt, A, B, C, dt_bias, segments, initial_state)
    rows, final = [], []
    for index, (start, length) in enumerate(segments):
        h = state[index]
        for t in range(start, start + length):
            h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * x[t])[:, None] * B[t]
            rows.append(h @ C[t])
        final.append(h)
    return _finish(torch.stack(rows), x, D, z, u.dtype), torch.stack(final)


def selective_scan_chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan_reference`, in vectorised chunks."""
    x, delta, A, B, C, state = _promote(u, dt, A, B, C, dt_bias, segments, initial_state)
    # States lead and channels trail: every operation then runs along contiguous channels.
    y, final = _Recurrence.apply(delta * x, delta, A.T, B, C, state.mT, segments)
    return _finish(y, x, D, z, u.dtype), final.mT


def scan_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token a row, N = S: `selective_scan_reference` with every segment of length 1."""
    every = Segments((1,) * u.shape[0])
    x, delta, A, B, C, h = _promote(u, dt, A, B, C, dt_bias, every, state)
    h = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
    return _finish((h @ C[..., None])[..., 0], x, D, z, u.dtype), h


def _promote(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything in the accumulation dtype; dt after softplus; one state a segment."""
    wide = torch.promote_types(u.dtype, torch.float32)
    delta = F.softplus(dt.to(wide) + dt_bias.to(wide))
    if state is None:
        state = u.new_zeros(1, *A.shape)
    state = state.to(wide).expand(segments.count, *A.shape)
    return u.to(wide), delta, A.to(wide), B.to(wide), C.to(wide), state


def _finish(y: Tensor, x: Tensor, D: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.addcmul(y, x, D.to(x.dtype))
    return (y * F.silu(z.to(x.dtype))).to(dtype)


class _Recurrence(torch.autograd.Function):
    """h_t = exp(delta_t A) h_{t-1} + B_t x_t, y_t = <C_t, h_t>, in chunks.

    x, delta (N, E); A (n, E); B, C (N, n); state (S, n, E) -> y (N, E), final (S, n, E)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:
        walk = _Walk(segments, A.numel(), x.device)
        y, final = x.new_empty(x.shape), x.new_empty(state.shape)
        begins = []
        for block in walk.channel_blocks(x.shape[1]):
            part = _Chunks(walk, x[:, block], delta[:, block], A[:, block], B, C)
            out, end, begin = part.forward(state[..., block])
            y[:, block], final[..., block] = out, end
            begins.append(begin)
        ctx.walk = walk
        ctx.save_for_backward(x, delta, A, B, C, state, *begins)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, state, *begins = ctx.saved_tensors
        dy, dfinal = grads
        walk = ctx.walk
        dx, ddelta, dA = torch.empty_like(x), torch.empty_like(delta), A.new_empty(A.shape)
        dB, dC = torch.zeros_like(B), torch.zeros_like(C)
        dstate = dfinal.new_empty(dfinal.shape)
        for block, begin in zip(walk.channel_blocks(x.shape[1]), begins, strict=True):
            part = _Chunks(walk, x[:, block], delta[:, block], A[:, block], B, C)
            got = part.backward(dy[:, block], dfinal[..., block], begin, state[..., block])
            dx[:, block], ddelta[:, block], dA[:, block], dstate[..., block] = got[:4]
            dB += got[4]
            dC += got[5]
        return dx, ddelta, dA, dB, dC, dstate, None


class _Walk:
    """How N rows are cut in `count` chunks of `size`, and where segments start and end in them."""

    def __init__(self, segments: Segments, width: int, device: torch.device):
        self.rows, self.width = segments.total, width
        self.size = _chunk_size(segments, width)
        self.count = -(-self.rows // self.size)
        self.starts = self._by_step(segments.starts, device)
        self.ends = self._by_step(segments.ends, device)
        first = {row // self.size for row in segments.starts if row % self.size == 0}
        self.chained = len(first) < self.count  # does any chunk begin inside a segment?
        # A carried state survives a chunk only where no segment starts in it.
        cut = sorted({row // self.size for row in segments.starts})
        self.survives = torch.ones(self.count, 1, 1, device=device)
        self.survives[torch.tensor(cut, device=device)] = 0

    def _by_step(
        self, rows: tuple[int, ...], device: torch.device
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """{step within a chunk: (chunks, segments)} for the rows given, one a segment."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for segment, row in enumerate(rows):
            chunks, owners = found.setdefault(row % self.size, ([], []))
            chunks.append(row // self.size)
            owners.append(segment)
        return {
            step: (torch.tensor(chunks, device=device), torch.tensor(owners, device=device))
            for step, (chunks, owners) in found.items()
        }

    def channel_blocks(self, channels: int) -> list[slice]:
        """Slices of channels such that a step and a block stay within their sizes."""
        states = self.width // channels
        fits = STEP_ELEMENTS // (self.count * states)
        room = BLOCK_ELEMENTS // (self.rows * states)
        block = max(64, min(channels, fits, room))
        return [slice(i, min(i + block, channels)) for i in range(0, channels, block)]

    def cut(self, rows: Tensor) -> Tensor:
        """(N, X) -> (size, count, X): step first, so that a step of all chunks is one slice."""
        missing = self.size * self.count - self.rows
        if missing:
            rows = F.pad(rows, (0, 0, 0, missing))  # dt 0 leaves a state as it is
        return rows.unflatten(0, (self.count, self.size)).transpose(0, 1)

    def join(self, steps: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return steps.transpose(0, 1).flatten(0, 1)[: self.rows]


def _chunk_size(segments: Segments, width: int) -> int:
    """Whole segments as chunks where they are equal and many enough to fill a step (each
    exponential is then paid once); else about the square root of the rows, the fewest steps."""
    if segments.uniform and segments.count * width >= STEP_ELEMENTS:
        return segments.uniform
    return max(16, min(64, int(segments.total**0.5)))


class _Chunks:
    """All chunks of one block of channels. Shapes: c chunks, n states, e channels, Q steps."""

    def __init__(self, walk: _Walk, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.walk, self.A = walk, A.contiguous()
        self.x, self.delta = walk.cut(x).unsqueeze(2), walk.cut(delta).unsqueeze(2)
        self.B, self.C = walk.cut(B).unsqueeze(-1), walk.cut(C).unsqueeze(-1)
        # x, delta (Q, c, 1, e); B, C (Q, c, n, 1)

    def decay(self, step: int, out: Tensor) -> Tensor:
        """exp(delta A) of one step of all chunks (c, n, e), in place of `out`."""
        return torch.mul(self.delta[step], self.A, out=out).exp_()

    def whole_decay(self) -> Tensor:
        """What is left of a state after each chunk (c, n, e): a product of decays, as a sum."""
        return torch.exp(self.delta.sum(0) * self.A).mul_(self.walk.survives)

    def new_states(self) -> Tensor:
        return self.x.new_zeros(self.walk.count, *self.A.shape)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """state (S, n, e) -> y (N, e), final (S, n, e), the state each chunk begins with."""
        begin = self.begin_states(state)
        final = state.new_empty(state.shape)
        y = self.x.new_empty(self.walk.size, self.walk.count, 1, self.x.shape[-1])
        h, decay = begin.clone(), torch.empty_like(begin)
        for step in range(self.walk.size):
            self.advance(h, step, state, decay)
            torch.bmm(self.C[step].mT, h, out=y[step])
            if step in self.walk.ends:
                chunks, owners = self.walk.ends[step]
                final[owners] = h[chunks]
        return self.walk.join(y[:, :, 0]), final, begin

    def advance(self, h: Tensor, step: int, state: Tensor, decay: Tensor) -> None:
        """One token of every chunk, in place."""
        self.meet_start(h, step, state)
        h.mul_(self.decay(step, decay)).addcmul_(self.x[step], self.B[step])

    def begin_states(self, state: Tensor) -> Tensor:
        """Run every chunk from zero, then chain what they leave: (c, n, e)."""
        h = self.new_states()
        if not self.walk.chained:
            return h  # every chunk begins with a segment, whose state `advance` puts in
        decay = torch.empty_like(h)
        for step in range(self.walk.size):
            self.advance(h, step, state, decay)
        left, begin = self.whole_decay(), torch.zeros_like(h)
        for chunk in range(1, self.walk.count):
            torch.addcmul(h[chunk - 1], left[chunk - 1], begin[chunk - 1], out=begin[chunk])
        return begin

    def backward(
        self, dy: Tensor, dfinal: Tensor, begin: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        """Walks back with g = dL/dh; a state before its input is recomputed and kept.

        Returns dx, ddelta (N, e), dA (n, e), dstate (S, n, e), and this block's dB, dC (N, n)."""
        steps = self.walk.cut(dy).unsqueeze(2)  # (Q, c, 1, e)
        kept = self.decayed_states(begin, state)  # (Q, c, n, e)
        carry = self.end_gradients(steps, dfinal)
        dx, ddelta = torch.empty_like(steps), torch.empty_like(steps)
        dB, dC = torch.empty_like(self.B), torch.empty_like(self.C)
        dA, dstate = torch.zeros_like(carry), torch.empty_like(state)
        decay, g = torch.empty_like(carry), torch.empty_like(carry)
        for step in reversed(range(self.walk.size)):
            self.meet_end(carry, step, dfinal)
            torch.addcmul(carry, steps[step], self.C[step], out=g)
            torch.bmm(self.B[step].mT, g, out=dx[step])
            torch.bmm(g, self.x[step].mT, out=dB[step])
            torch.bmm(kept[step], steps[step].mT, out=dC[step])
            torch.mul(self.decay(step, decay), g, out=carry)
            through = g.mul_(kept[step])  # dL/d(delta A), element by element
            dA.addcmul_(through, self.delta[step])
            torch.sum(through.mul_(self.A), dim=1, keepdim=True, out=ddelta[step])
            self.leave_start(carry, step, dstate)
        dC.addcmul_(self.B, (self.x * steps).sum(-1, keepdim=True))  # the input's part of h
        join = self.walk.join
        return (
            join(dx[:, :, 0]),
            join(ddelta[:, :, 0]),
            dA.sum(0),
            dstate,
            join(dB[..., 0]),
            join(dC[..., 0]),
        )

    def decayed_states(self, begin: Tensor, state: Tensor) -> Tensor:
        """exp(delta_t A) h_{t-1} for every token (Q, c, n, e)."""
        kept = begin.new_empty(self.walk.size, *begin.shape)
        h = begin.clone()
        for step in range(self.walk.size):
            self.meet_start(h, step, state)
            torch.mul(h, self.decay(step, kept[step]), out=kept[step])
            torch.addcmul(kept[step], self.x[step], self.B[step], out=h)
        return kept

    def end_gradients(self, dy: Tensor, dfinal: Tensor) -> Tensor:
        """What reaches each chunk's last state from the chunks after it (c, n, e)."""
        carry = self.new_states()
        if not self.walk.chained:
            return carry
        decay = torch.empty_like(carry)
        for step in reversed(range(self.walk.size)):
            self.meet_end(carry, step, dfinal)
            carry.addcmul_(dy[step], self.C[step]).mul_(self.decay(step, decay))
            self.leave_start(carry, step, None)
        left, arriving = self.whole_decay(), torch.zeros_like(carry)
        for chunk in reversed(range(1, self.walk.count)):
            torch.addcmul(carry[chunk], left[chunk], arriving[chunk], out=arriving[chunk - 1])
        return arriving

    def meet_start(self, h: Tensor, step: int, state: Tensor) -> None:
        if step in self.walk.starts:
            chunks, owners = self.walk.starts[step]
            h[chunks] = state[owners]

    def meet_end(self, carry: Tensor, step: int, dfinal: Tensor) -> None:
        if step in self.walk.ends:
            chunks, owners = self.walk.ends[step]
            carry[chunks] = dfinal[owners]

    def leave_start(self, carry: Tensor, step: int, dstate: Tensor | None) -> None:
        """A segment's first token hands its gradient to the initial state, not to the row before."""
        if step in self.walk.starts:
            chunks, owners = self.walk.starts[step]
            if dstate is not None:
                dstate[owners] = carry[chunks]
            carry[chunks] = 0
