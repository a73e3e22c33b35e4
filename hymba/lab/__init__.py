"""The laboratory: is the hybrid head better, and why? Comparisons at one parameter budget.

    variants.py   the architectures: base plus one line each, fitted to one budget    (no torch)
    sizes.py      how large: toy, small, 2m, 20m, 35m                                 (no torch)
    options.py    the command line                                                     (no torch)
    tasks.py      recall: what is trained on, and the grid that is tested
    language.py   bits per byte of a real corpus, by position
    recall.py     accuracy over length and number
    cost.py       tokens a second and bytes of cache, on the engine that users run
    training.py   one model, trained; the same settings for all
    jobs.py       runs as folders: which are done, which come next, until when
    verdict.py    findings of the paper, and the rule that judges them                (no torch)
    report.py     results/lab-*.json; tables.py and figures.py show them               (no torch)

`python -m hymba.lab` is `hymba lab`; it needs torch, numpy, safetensors and transformers alone.
"""
