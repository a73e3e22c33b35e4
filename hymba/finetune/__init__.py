"""Fine-tuning: from chats or preferences in JSONL to a model folder, through TRL and PEFT.

In reading order: settings, lines (what a file says), template (the chat format), masks (tokens and
which of them are learnt), folder (what is kept between runs), plan, trainers (TRL's, and what they
tell), result, run.

Nothing of training itself is written here: the loss, the optimiser and the loop are TRL's and
transformers', the adapters PEFT's, the model `hymba.hf`'s.
"""
