"""What the heads of a trained model do: `hymba probe MODEL --out folder`. In reading order:

walk          a layer laid open, with the model's own parts
attention     its attention's weights;  hidden: the SSM's, seen as attention
share         where weights go, how spread they are, how far back: one pass for all that follows
field, meta, magnitude, importance, sharing      a question each
run           all of it for some texts (texts, samples), as plain data
findings      the paper's statements, and what this model shows
figures, draw, report, page/                     the page
"""
