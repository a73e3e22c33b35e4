"""LoRA through peft and transformers: train an adapter, save it, load it, merge it.

    python examples/finetune_lora.py                     # a tiny random model learns one sentence
    python examples/finetune_lora.py runs/demo/hymba     # what `make demo` trained

It needs peft: pip install 'hymba[finetune]'. For datasets, packing and checkpoints use trl or
transformers' Trainer in place of the loop; the model is an ordinary one for them.
"""

import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import hymba
import hymba.hf  # tells transformers' Auto classes about the model
from hymba.tokenizer import Tokenizer

SENTENCE = "The hybrid head reads the same tokens with two memories, one exact and one fading."
# Every linear layer of the SSM and attention; "all-linear" would take the MLP's too.
TARGETS = ["in_proj", "out_proj", "x_proj", "dt_proj"]


def base(folder: str | None) -> tuple[torch.nn.Module, Tokenizer]:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder), Tokenizer.from_folder(folder)
    tokenizer = Tokenizer.train([SENTENCE], vocab_size=320)
    # Larger initial weights than usual: the embedding stays frozen, and from small ones no
    # adapter could make the head sure of a token.
    config = hymba.Config.preset("hymba-tiny").replace(
        vocab_size=tokenizer.vocab_size, initializer_range=0.1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hymba.hf.HymbaConfig.from_hymba(config))
    return model, tokenizer


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def main(folder: str | None) -> None:
    model, tokenizer = base(folder)
    ids = torch.tensor([tokenizer.encode(SENTENCE, bos=True)])  # (1, T)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS))
    adapted.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(40):
        loss = loss_of(adapted, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == 39:
            print(f"step {step:2}  loss {loss.item():.3f}")

    adapted.eval()
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        learnt = loss_of(adapted, ids)
        adapted.save_pretrained(place)  # the adapter alone
        fresh, _ = base(folder)
        merged = PeftModel.from_pretrained(fresh, place).merge_and_unload().eval()
        torch.testing.assert_close(loss_of(merged, ids), learnt, rtol=1e-3, atol=1e-4)
        out = merged.generate(ids[:, :8], max_new_tokens=24, do_sample=False)
    print("merged, it says:", tokenizer.decode(out[0].tolist()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
