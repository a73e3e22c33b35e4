"""The selective scan of Mamba-1 over segments: a running summary with a fading memory.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        one h of n numbers for each channel
    y_t = <C_t, h_t> + D u_t,   then   y_t * silu(z_t)

Letters: N rows, S segments, E channels, n states a channel. dt goes through softplus with its bias
here. Accumulates in float32 (float64 for float64 inputs). Source: Gu and Dao 2023 (Mamba), section
3; the gate and D as in the released Hymba code.

`selective_scan_reference` is that recurrence, token by token. `selective_scan_chunked` is the same
function, fast on a CPU. All segments stand in one row, with a joint before each and one at the end,

    J a a a a J b b b J c c J

and a joint is a row too: its decay is 0 and it adds the initial state of the segment behind it, so
that h before a joint is a final state and h after it an initial one; backwards it receives and
hands on their gradients in the same way. Segments need no other care. The row is cut in blocks and
a block in lanes that walk side by side, each step of all of them one call:

    lane 0  J a a a      each runs from zero first to learn what it adds to the state, then they
    lane 1  a J b b      are chained, then each walks again from its true state. Everything that
    lane 2  b J c c      needs no order (decays, inputs, outputs) is a few calls a block.

Only products of decays are formed, never a division by one, so it is safe for any dt and A <= 0.
Backward is written by hand; it keeps one state a lane and recomputes the rest block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops.segments import Segments

# Elements (lanes x states x channels) of one step, enough to hide the cost of a torch call and
# little enough for a second-level cache, and of one block, of which a walk holds three.
STEP_ELEMENTS = 1 << 15
BLOCK_ELEMENTS = 1 << 19


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
        with _one_thread(x.device):
            walk = _Walk(plan, x, delta, A, B, C)
            y, final, begins = walk.forward(state)
        ctx.plan = plan
        ctx.save_for_backward(x, delta, A, B, C, state, begins)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, state, begins = ctx.saved_tensors
        with _one_thread(x.device):
            walk = _Walk(ctx.plan, x, delta, A, B, C)
            return *walk.backward(dy, dfinal, state, begins), None


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """A walk is thousands of calls too short to share out: a second thread gains little on an idle
    machine, and on a busy one every call waits for it (100 times slower: docs/log.md)."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Plan:
    """Where each row stands: block, step, lane. Made once for both directions."""

    def __init__(self, segments: Segments, width: int, device: torch.device):
        rows = segments.total + segments.count + 1
        scale = 1 if device.type == "cpu" else 32
        lanes = max(1, min(scale * STEP_ELEMENTS // width, math.isqrt(rows)))
        steps = max(1, scale * BLOCK_ELEMENTS // (lanes * width))
        self.blocks = -(-rows // (lanes * steps))
        self.lanes, self.steps = lanes, -(-rows // (lanes * self.blocks))
        joint = torch.arange(1, segments.count + 1)  # each token stands behind so many joints
        joint = joint.repeat_interleave(torch.tensor(segments.lengths))
        self.rows = self._place(torch.arange(segments.total) + joint).to(device)
        self.joints = self._joints(segments, device)

    def _place(self, row: Tensor) -> Tensor:
        """A lane is `steps` rows, one after the other, but the rows of one step lie together."""
        size = self.lanes * self.steps
        block, row = row // size, row % size
        return block * size + row % self.steps * self.lanes + row // self.steps

    def _joints(self, segments: Segments, device: torch.device) -> list[dict[int, _Joints]]:
        """For each block {step: joints there}."""
        found: list[dict[int, tuple[list[int], list[int]]]] = [{} for _ in range(self.blocks)]
        for index, start in enumerate((*segments.starts, segments.total)):
            lane, step = divmod(start + index, self.steps)
            lanes, indices = found[lane // self.lanes].setdefault(step, ([], []))
            lanes.append(lane % self.lanes)
            indices.append(index)
        return [
            {
                step: _Joints(
                    torch.tensor(lanes, device=device), torch.tensor(indices, device=device), lanes
                )
                for step, (lanes, indices) in block.items()
            }
            for block in found
        ]

    def spread(self, rows: Tensor) -> Tensor:
        """(N, X) -> (blocks, Q, c, X), zeros at the joints and after the end."""
        out = rows.new_zeros(self.blocks * self.steps * self.lanes, rows.shape[1])
        out.index_copy_(0, self.rows, rows)
        return out.view(self.blocks, self.steps, self.lanes, -1)

    def gather(self, rows: Tensor) -> Tensor:
        """The inverse of `spread`; (blocks, Q, c, 1, X) and (blocks, Q, c, X, 1) will do."""
        return rows.flatten(0, 2).flatten(1).index_select(0, self.rows)


class _Joints(NamedTuple):
    """The joints of one step of one block."""

    lanes: Tensor
    indices: Tensor  # 0 .. S: joint i stands before segment i
    cut: list[int]  # the lanes again


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
        lanes = list(zip(self.rows[0], left, self.added(), strict=True))[::order]
        lanes[0][0].copy_(carry)
        cut = {lane for found in self.joints.values() for lane in found.cut}
        cuts = [lane in cut for lane in range(len(lanes))][::order]
        for is_cut, (begin, kept, added), (following, _, _) in zip(
            cuts, lanes, lanes[1:], strict=False
        ):
            if is_cut:
                following.copy_(added)
            else:
                torch.addcmul(added, kept, begin, out=following)

    def added(self) -> Tensor:
        """(c, n, e)"""
        h = torch.zeros_like(self.rows[0])
        if len(h) == 1:
            return h  # nothing follows the only lane
        for step, (fade, row) in enumerate(zip(self.decay, self.rows[1:], strict=True)):
            torch.addcmul(row, fade, h, out=h)
            if step in self.joints:
                lanes, indices, _ = self.joints[step]
                h[lanes] = self.given[indices]
        return h


class _Walk:
    """Buffers for one block, and the way over all blocks. Q steps, c lanes, n states, e channels."""

    def __init__(self, plan: _Plan, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.plan = plan
        self.A = A.contiguous()
        # exp2, because torch's exp is several times slower on some CPUs. No -inf: times 0 is NaN.
        self.A_log2 = (self.A * math.log2(math.e)).clamp_(min=torch.finfo(A.dtype).min)
        self.x, self.delta = (plan.spread(v).unsqueeze(3) for v in (x, delta))
        self.B, self.C = (plan.spread(v).unsqueeze(4) for v in (B, C))
        # x, delta (blocks, Q, c, 1, e); B, C (blocks, Q, c, n, 1)
        self.decay = x.new_empty(plan.steps, plan.lanes, *A.shape)
        self.h = x.new_empty(plan.steps + 1, plan.lanes, *A.shape)  # h[0]: before the first step

    def fill(self, i: int) -> None:
        """The decays of block i, and in h[1:] what each row adds."""
        torch.mul(self.delta[i], self.A_log2, out=self.decay).exp2_()
        torch.mul(self.B[i], self.x[i], out=self.h[1:])

    def left(self, i: int) -> Tensor:
        """What is left of a state after each lane (c, n, e): a product of decays, as a sum."""
        return torch.exp2(self.delta[i].sum(0) * self.A_log2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """state (S, n, e) -> y (N, e), final (S, n, e), and h[0] of every block."""
        plan, y = self.plan, torch.empty_like(self.x)
        given = F.pad(state, (0, 0, 0, 0, 0, 1))
        received = torch.empty_like(given)
        begins = state.new_empty(plan.blocks, *self.h[0].shape)
        carry = torch.zeros_like(self.A)
        for i in range(plan.blocks):
            self.fill(i)
            line = _Line(self.decay.unbind(), self.h.unbind(), plan.joints[i], given)
            line.enter(carry, self.left(i), order=1)
            begins[i] = self.h[0]
            line.walk(received)
            carry = self.h[-1, -1].clone()
            torch.bmm(_flat(self.C[i]).mT, _flat(self.h[1:]), out=_flat(y[i]))
        return plan.gather(y), received[1:], begins

    def backward(
        self, dy: Tensor, dfinal: Tensor, state: Tensor, begins: Tensor
    ) -> tuple[Tensor, ...]:
        """From the end, with g_t = decay_t dL/dh_t: what reaches h_{t-1} from row t.

        Returns dx, ddelta (N, e), dA (n, e), dB, dC (N, n), dstate (S, n, e)."""
        plan, dy = self.plan, self.plan.spread(dy).unsqueeze(3)
        given, back = F.pad(state, (0, 0, 0, 0, 0, 1)), F.pad(dfinal, (0, 0, 0, 0, 1, 0))
        received = torch.empty_like(back)
        dA, carry = torch.zeros_like(self.A), torch.zeros_like(self.A)
        dx, ddelta, dB, dC = (torch.empty_like(v) for v in (self.x, self.delta, self.B, self.C))
        g = torch.empty_like(self.h)  # g[-1]: from behind the last step
        for i in reversed(range(plan.blocks)):
            self.fill(i)
            self.h[0] = begins[i]
            _Line(self.decay.unbind(), self.h.unbind(), plan.joints[i], given).walk()
            torch.bmm(_flat(self.h[1:]), _flat(dy[i]).mT, out=_flat(dC[i]))
            torch.mul(self.decay, dy[i], out=g[:-1]).mul_(self.C[i])
            joints = {plan.steps - 1 - step: found for step, found in plan.joints[i].items()}
            line = _Line(self.decay.unbind()[::-1], g.unbind()[::-1], joints, back)
            line.enter(carry, self.left(i), order=-1)
            line.walk(received)
            carry = g[0, 0].clone()
            torch.bmm(_flat(self.B[i]).mT, _flat(g[1:]), out=_flat(dx[i]))
            torch.bmm(_flat(g[1:]), _flat(self.x[i]).mT, out=_flat(dB[i]))
            through = self.h[:-1].mul_(g[:-1])  # dL/d(delta A), element by element
            torch.sum(torch.mul(through, self.A, out=self.decay), 2, keepdim=True, out=ddelta[i])
            dA += through.mul_(self.delta[i]).sum((0, 1))
        # What a row's own y takes, beside what comes back from the rows behind it.
        dx.addcmul_((self.B * self.C).sum(3, keepdim=True), dy)
        dB.addcmul_(self.C, (self.x * dy).sum(4, keepdim=True))
        rows = [plan.gather(v) for v in (dx, ddelta, dB, dC)]
        return rows[0], rows[1], dA, rows[2], rows[3], received[:-1]


def _flat(block: Tensor) -> Tensor:
    """(Q, c, ...) -> (Q c, ...), a view."""
    return block.flatten(0, 1)
