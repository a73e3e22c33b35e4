"""Rounding that looks at text: weights in few bits, chosen so that a layer's outputs stay.

    rows = text_rows(Tokenizer.from_folder(folder), texts)       # (128, 512) token ids
    model = calibrate(folder, "int4", rows)                      # hours for 1.5B, a minute for 2 M
    hymba.save(model, "folder-int4")                             # as load(quantize="int4") would be

gptq        one matrix: errors of a column made good in the columns after it
calibrate   a whole model, layer by layer, each reading what the rounded ones before it give

Rounding to nearest needs none of this: `hymba.load(folder, quantize="int4")`.
"""

from hymba.quant.calibrate import calibrate, text_rows

__all__ = ["calibrate", "text_rows"]
