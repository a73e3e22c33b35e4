"""What a decode step walks: records of addresses, sizes and kinds, filled in by `program` and read
by compiled code under the same names. Nothing else passes between Python and a step.

    Model    where everything is: layers, rows, buffers, the head
    Layer    one block, what its branches read and write
    Matrix   weights of a product          Keys   keys and values, a store's or the meta tokens'
    Row      one sequence's new token, filled in before each step

Addresses and distances ("stride", "bytes") are in bytes, sizes in elements. Letters: D hidden, E
inner channels, n states a channel, R rank of dt, K taps; G groups of K/V heads, r query heads in a
group, h and e widths of key and value heads, F the MLP's width. Vectors of constants are float32,
padded with zeros to whole vectors of 16, those that meet activations to whole groups of 64.
"""

from __future__ import annotations

import numpy as np

BLOCK = 256  # places that attention looks at in one go: a page of the store
ROWS = 8  # at most so many sequences a step; more go one step after another
SPAN = 64  # columns that no piece of work cuts: a group of every scheme divides it

# Kinds of matrices: how weights are kept and what they are multiplied with.
DENSE, INT4, INT8, INT4_EXACT, INT8_EXACT = range(5)
# Ways to make an output projection's input of what the branches made: as it is, the mean of both
# normed, both normed side by side.
PLAIN, MEAN, CONCAT = range(3)
GATED, RELU2 = range(2)

_word = np.int64


def _record(words: str, *others: tuple[str, object]) -> np.dtype:
    return np.dtype([*((name, _word) for name in words.split()), *others], align=True)


# address: of its tiles of 32 rows, or of float32 rows. group: columns that share a scale. meet: the
# address of what multiplies a tile.
MATRIX = _record("address kind rows columns tiles tile_bytes group groups group_bytes meet")

# Place p of page i of group g: address + i * page + g * group + p * place, bytes between them in
# k and v; `bytes` of an element: 4 float32, 2 bfloat16.
KEYS = _record("k v k_page v_page k_group v_group k_place v_place bytes")

ATTENTION = _record(
    # `ring`: places of a ring by slot, 0 for pages through the table. `meta_count` may be 0.
    "on groups heads h e h_padded e_padded ring owns_kv meta_count q_at k_at v_at",
    ("text", KEYS),
    ("meta", KEYS),
)

SSM = _record(
    # conv, state: of slot 0; the taps' weights are (K, E), A is (E, n), both padded.
    "on channels padded states states_padded rank taps u_at gate_at y_at conv conv_slot state"
    " state_slot conv_weight conv_bias A D dt_bias dt_norm B_norm C_norm",
    ("x_proj", MATRIX),
    ("dt_proj", MATRIX),
)

LAYER = _record(
    # norms: of each of the branches side by side, with signs and scalars. width: of one branch.
    "input_norm fusion norms width mlp activation mlp_norm",
    ("in_proj", MATRIX),
    ("attention", ATTENTION),
    ("ssm", SSM),
    ("out_proj", MATRIX),
    ("gate_proj", MATRIX),
    ("up_proj", MATRIX),
    ("down_proj", MATRIX),
)

ROW = _record("token slot length")

# Rows of activations as products read them; see product.py. columns: room, not what is used.
ACTIVATIONS = _record("address stride columns")

MODEL = _record(
    # row: of the first Row. table: pages of each slot, int32. frequencies: of rotary positions.
    "rows row layers layer_count hidden head_dim meta_tokens final_norm table table_bytes"
    " frequencies"
    # Buffers of rows, each with the bytes between its rows (gate's are those of `inner`).
    " x other_x x_stride proj proj_stride mix mix_stride u u_stride dt dt_stride turns turns_stride"
    " low low_stride low_part gate parts part_bytes logits logits_stride scratch scratch_bytes",
    ("eps", np.float32),
    ("embedding", MATRIX),
    ("head", MATRIX),
    ("input", ACTIVATIONS),
    ("inner", ACTIVATIONS),
)
