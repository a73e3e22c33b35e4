"""Teach a small model the calendar, then to be brief about it.

    python examples/finetune_chat.py make runs/calendar      # writes chats, preferences, questions
    hymba finetune runs/demo/hymba --data runs/calendar/chats.jsonl --out runs/taught \\
        --held-out 2% --lr 2e-3 --rows 8 --micro-rows 8
    python examples/finetune_chat.py ask runs/taught runs/calendar/questions.jsonl
    hymba finetune runs/taught --data runs/calendar/preferences.jsonl --out runs/brief \\
        --held-out 5% --lr 5e-5 --rows 8 --micro-rows 8
    python examples/finetune_chat.py ask runs/brief runs/calendar/questions.jsonl

The chats ask what comes after a day or a month, each in four of six wordings; half of the answers
are a sentence and half a single word. The questions are those that no chat asks: each fact in the
two wordings that were kept from it. The preferences are for the single word.
docs/finetuning.md shows what comes out.
"""

import json
import random
import sys
from pathlib import Path

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
KINDS = {"day": DAYS, "month": MONTHS}
WORDINGS = (
    "Which {0} comes after {1}?",
    "What follows {1}?",
    "Next after {1}?",
    "{1}, and then?",
    "Name the {0} after {1}.",
    "{1} is over. What is next?",
)
CHATS, PREFERENCES = 5000, 400


def ways() -> tuple[list, list]:
    """(question, sentence, word) of every wording of every fact: those to teach, those to ask."""
    taught, kept = [], []
    for kind, names in KINDS.items():
        for i, (name, word) in enumerate(zip(names, names[1:] + names[:1], strict=True)):
            for j, wording in enumerate(WORDINGS):
                asked = wording.format(kind, name), f"The {kind} after {name} is {word}.", word
                (kept if (i + j) % 3 == 0 else taught).append(asked)
    return taught, kept


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    taught, kept = ways()
    chats, preferences = [], []
    for _ in range(CHATS):
        asked, *answers = rng.choice(taught)
        said = [says("user", asked), says("assistant", rng.choice(answers))]
        chats.append({"messages": said})
    for _ in range(PREFERENCES):
        asked, sentence, word = rng.choice(taught)
        sides = {"chosen": [says("assistant", word)], "rejected": [says("assistant", sentence)]}
        preferences.append({"prompt": [says("user", asked)], **sides})
    questions = [{"question": asked, "answers": answers} for asked, *answers in kept]
    files = {"chats": chats, "preferences": preferences, "questions": questions}
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{len(lines):5,} lines in {folder / name}.jsonl")


def ask(model: str, file: Path) -> None:
    """Every question of the file, answered greedily and counted."""
    import torch

    import hymba

    torch.set_num_threads(2)
    llm = hymba.LLM(model, device="cpu")
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = llm.tokenizer_or_error()
    if tokenizer.has_chat_template:
        prompts = [tokenizer.chat([says("user", q["question"])]) for q in questions]
    else:  # before fine-tuning: plain text, as `hymba chat` asks such a model
        prompts = [tokenizer.encode(q["question"], bos=True) for q in questions]
    outputs = llm.generate(prompts, hymba.Sampling(max_tokens=24, temperature=0))
    pairs = [(out.text.strip(), q) for out, q in zip(outputs, questions, strict=True)]
    for said, question in pairs[:: len(pairs) // 4]:
        print(f"  {question['question']:36} {said!r}")
    right = sum(said in question["answers"] for said, question in pairs)
    word = sum(said == question["answers"][1] for said, question in pairs)
    print(f"right {right} of {len(pairs)}, as a single word {word}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder))
        case ["ask", model, file]:
            ask(model, Path(file))
        case _:
            sys.exit(__doc__)
