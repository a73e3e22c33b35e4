"""The selective scan of Mamba-1 over segments: a running summary with a fading memory.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        one h of n numbers for each channel
    y_t = <C_t, h_t> + D u_t,   then   y_t * silu(z_t)

Letters: N rows, S segments, E channels, n states a channel. dt goes through softplus with its bias
here. Accumulates in float32 (float64 for float64 inputs). Source: Gu and Dao 2023 (Mamba), section
3; the gate and D as in the released Hymba code.

`selective_scan_reference` is that recurrence, token by token. `selective_scan_chunked` is the same
function, fast on a CPU. All segments stand in one row, with a joint before each and one at the end,

    J a a a a J b b b J c c J

and a joint is a row too: h of the row before it is a final state, and its own h is the initial
state of the segment behind it. Backwards a joint receives and hands on gradients in the same way,
so segments need no other care. The row is cut in blocks, and a block in lanes that walk side by
side, each step of all of them one call:

    lane 0  J a a a      each runs from zero first to learn what it adds to the state, then they
    lane 1  a J b b      are chained, then each walks again from its true state. Everything that
    lane 2  b J c c      needs no order (decays, inputs, outputs) is a few calls a block.

Only products of decays are formed, never a division by one, so it is safe for any dt and A <= 0.
Backward is written by hand; it keeps one state a lane and recomputes the rest block by block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops.segments import Segments

# Elements (lanes x states x channels) of one step, enough to hide the cost of a torch call and
# little enough for a second-level cache, and of one block, of which a walk holds three.
STEP_ELEMENTS = 1 << 16
BLOCK_ELEMENTS = 1 << 20


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


def selective_scan(
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
    """As `selective_scan_reference`: one step where every segment is one row, else chunks."""
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    if segments.uniform == 1 and initial_state is not None:
        return scan_step(*inputs, initial_state)
    return selective_scan_chunked(*inputs, segments, initial_state)


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
    """h_t = exp(delta_t A) h_{t-1} + B_t x_t, y_t = <C_t, h_t>, block by block.

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
        plan = _Plan(segments, A.numel(), x.device)
        with torch.autocast(x.device.type, enabled=False):  # all is in the wide dtype already
            walk = _Walk(plan, x, delta, A, B, C)
            y, final, begins = walk.forward(state)
        ctx.plan = plan
        ctx.save_for_backward(x, delta, A, B, C, state, begins)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, state, begins = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            walk = _Walk(ctx.plan, x, delta, A, B, C)
            return *walk.backward(dy, dfinal, state, begins), None


class _Plan:
    """Where each row stands: block, step, lane. Made once for both directions."""

    def __init__(self, segments: Segments, width: int, device: torch.device):
        self.total, rows = segments.total, segments.total + segments.count + 1
        scale = 1 if device.type == "cpu" else 8
        lanes = max(1, min(scale * STEP_ELEMENTS // width, math.isqrt(rows)))
        steps = max(1, scale * BLOCK_ELEMENTS // (lanes * width))
        self.blocks = -(-rows // (lanes * steps))
        self.lanes, self.steps = lanes, -(-rows // (lanes * self.blocks))
        self.tokens = self._tokens(segments).to(device)  # (blocks, Q c)
        self.absent = (self.tokens == self.total).view(self.blocks, self.steps, self.lanes, 1, 1)
        self.joints = self._joints(segments, device)

    def _tokens(self, segments: Segments) -> Tensor:
        """Which token stands where; N for none (a joint, or after the end)."""
        token = torch.arange(segments.total)
        joints = torch.arange(1, segments.count + 1)  # so many joints stand before each token
        row = token + joints.repeat_interleave(torch.tensor(segments.lengths))
        tokens = torch.full((self.blocks * self.lanes * self.steps,), segments.total)
        tokens[row] = token
        # A lane is Q rows, one after the other; the rows of one step shall lie together.
        return tokens.view(self.blocks, self.lanes, self.steps).mT.flatten(1)

    def _joints(self, segments: Segments, device: torch.device) -> list[dict[int, _Joints]]:
        """For each block {step: the joints there}."""
        found: list[dict[int, tuple[list[int], list[int]]]] = [{} for _ in range(self.blocks)]
        for index, start in enumerate((*segments.starts, segments.total)):
            lane, step = divmod(start + index, self.steps)
            lanes, indices = found[lane // self.lanes].setdefault(step, ([], []))
            lanes.append(lane % self.lanes)
            indices.append(index)
        return [
            {step: _Joints.of(*joints, device) for step, joints in block.items()} for block in found
        ]

    def take(self, i: int, rows: Tensor) -> Tensor:
        """(N, X) -> block i (Q, c, X); what stands where no token is does not matter."""
        tokens = self.tokens[i].clamp(max=self.total - 1)
        return rows.index_select(0, tokens).view(self.steps, self.lanes, -1)

    def put(self, i: int, rows: Tensor, block: Tensor) -> None:
        """The inverse, into rows (N + 1, X); the last is for what has no token."""
        rows.index_copy_(0, self.tokens[i], block.flatten(0, 1).flatten(1))


class _Joints(NamedTuple):
    """The joints of one step of one block."""

    lanes: Tensor
    indices: Tensor  # 0 .. S: joint i stands before segment i
    cut: list[int]  # the lanes again

    @staticmethod
    def of(lanes: list[int], indices: list[int], device: torch.device) -> _Joints:
        return _Joints(
            torch.tensor(lanes, device=device), torch.tensor(indices, device=device), lanes
        )


class _Line(NamedTuple):
    """One block in walking order, which is forward or from its end."""

    decay: Sequence[Tensor]  # Q of (c, n, e)
    rows: Sequence[Tensor]  # Q + 1: where the lanes come from, then what each step adds
    joints: Mapping[int, _Joints]
    given: Tensor  # (S + 1, n, e): what each joint hands on

    def walk(self, received: Tensor | None = None) -> None:
        """rows[t+1] += decay[t] rows[t], all lanes at once.

        A state is dropped at a joint, not multiplied by zero: one that is not finite stays with
        its segment."""
        steps = zip(self.decay, self.rows, self.rows[1:], strict=False)
        for step, (fade, before, row) in enumerate(steps):
            row.addcmul_(fade, before)
            if step in self.joints:
                lanes, indices, _ = self.joints[step]
                row[lanes] = self.given[indices]
                if received is not None:
                    received[indices] = before[lanes]

    def enter(self, carry: Tensor, left: Tensor, order: int) -> None:
        """Fill rows[0]: every lane runs from zero to learn what it adds, then they are chained
        from carry (n, e) by what is left after each, the last lane first where order is -1."""
        cut = {lane for found in self.joints.values() for lane in found.cut}
        lanes = list(zip(range(len(left)), self.rows[0], left, self.added(), strict=True))[::order]
        lanes[0][1].copy_(carry)
        for (lane, begin, kept, added), (_, following, _, _) in pairwise(lanes):
            if lane in cut:
                following.copy_(added)
            else:
                torch.addcmul(added, kept, begin, out=following)

    def added(self) -> Tensor:
        """What each lane adds to the state (c, n, e)."""
        h = torch.zeros_like(self.rows[0])
        if len(h) == 1:
            return h  # nobody follows the only lane
        for step, (fade, row) in enumerate(zip(self.decay, self.rows[1:], strict=True)):
            torch.addcmul(row, fade, h, out=h)
            if step in self.joints:
                lanes, indices, _ = self.joints[step]
                h[lanes] = self.given[indices]
        return h


class _Walk:
    """The way over all blocks. Q steps, c lanes, n states, e channels."""

    def __init__(self, plan: _Plan, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.plan, self.inputs = plan, (x, delta, B, C)
        self.A = A.contiguous()
        # exp2, because torch's exp is several times slower on some CPUs. No -inf: times 0 is NaN.
        self.A_log2 = (self.A * math.log2(math.e)).clamp_(min=torch.finfo(A.dtype).min)
        self.decay = x.new_empty(plan.steps, plan.lanes, *A.shape)
        self.h = x.new_empty(plan.steps + 1, plan.lanes, *A.shape)  # h[0]: before the first step

    def fill(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, delta (Q, c, 1, e) and B, C (Q, c, n, 1) of block i; its decays, and in h[1:] what
        each row adds."""
        x, delta, B, C = (self.plan.take(i, rows) for rows in self.inputs)
        x, delta, B, C = x.unsqueeze(2), delta.unsqueeze(2), B.unsqueeze(3), C.unsqueeze(3)
        delta.masked_fill_(self.plan.absent[i], 0)
        torch.mul(delta, self.A_log2, out=self.decay).exp2_()
        torch.mul(B, x, out=self.h[1:])
        return x, delta, B, C

    def left(self, delta: Tensor) -> Tensor:
        """What is left of a state after each lane (c, n, e): a product of decays, as a sum."""
        return torch.exp2(delta.sum(0) * self.A_log2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """state (S, n, e) -> y (N, e), final (S, n, e), and h[0] of every block."""
        plan = self.plan
        given = F.pad(state, (0, 0, 0, 0, 0, 1))
        received = torch.empty_like(given)
        begins = state.new_empty(plan.blocks, *self.h[0].shape)
        y = state.new_empty(plan.total + 1, state.shape[-1])
        carry = torch.zeros_like(self.A)
        for i in range(plan.blocks):
            _, delta, _, C = self.fill(i)
            line = _Line(self.decay.unbind(), self.h.unbind(), plan.joints[i], given)
            line.enter(carry, self.left(delta), order=1)
            begins[i] = self.h[0]
            line.walk(received)
            carry = self.h[-1, -1].clone()
            plan.put(i, y, _products(C.mT, self.h[1:]))
        return y[:-1], received[1:], begins

    def backward(
        self, dy: Tensor, dfinal: Tensor, state: Tensor, begins: Tensor
    ) -> tuple[Tensor, ...]:
        """From the end, with g_t = decay_t dL/dh_t: what reaches h_{t-1} from row t.

        Returns dx, ddelta (N, e), dA (n, e), dB, dC (N, n), dstate (S, n, e)."""
        plan = self.plan
        given, back = F.pad(state, (0, 0, 0, 0, 0, 1)), F.pad(dfinal, (0, 0, 0, 0, 1, 0))
        received = torch.empty_like(back)
        dA, carry = torch.zeros_like(self.A), torch.zeros_like(self.A)
        dx, ddelta, dB, dC = (v.new_empty(plan.total + 1, v.shape[1]) for v in self.inputs)
        g = torch.empty_like(self.h)  # g[-1]: from behind the last step
        for i in reversed(range(plan.blocks)):
            x, delta, B, C = self.fill(i)
            dout = plan.take(i, dy).unsqueeze(2)
            self.h[0] = begins[i]
            _Line(self.decay.unbind(), self.h.unbind(), plan.joints[i], given).walk()
            plan.put(i, dC, _products(self.h[1:], dout.mT))
            torch.mul(self.decay, dout, out=g[:-1]).mul_(C)
            joints = {plan.steps - 1 - step: found for step, found in plan.joints[i].items()}
            line = _Line(self.decay.unbind()[::-1], g.unbind()[::-1], joints, back)
            line.enter(carry, self.left(delta), order=-1)
            line.walk(received)
            carry = g[0, 0].clone()
            # What comes back from the rows behind, and what a row's own y takes.
            own = (B * C).sum(2, keepdim=True), (x * dout).sum(3, keepdim=True)
            plan.put(i, dx, _products(B.mT, g[1:]).addcmul_(own[0], dout))
            plan.put(i, dB, _products(g[1:], x.mT).addcmul_(own[1], C))
            through = self.h[:-1].mul_(g[:-1])  # dL/d(delta A), element by element
            plan.put(i, ddelta, torch.mul(through, self.A, out=self.decay).sum(2, keepdim=True))
            dA += through.mul_(delta).sum((0, 1))
        return dx[:-1], ddelta[:-1], dA, dB[:-1], dC[:-1], received[:-1]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products of (Q, c, k, m) and (Q, c, m, l)."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
