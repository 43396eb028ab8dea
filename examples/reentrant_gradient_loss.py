"""An attention loss that falls in the log while its gradient is zero, on stock transformers; and the two ways out.

A two-layer model answers "which token stood at place i?". The attention loss asks the answering row to look at place i;
its map is collected inside the attention function. Under reentrant checkpointing the first pass runs without a graph:
the collected loss has a value and no gradient. It falls all the same, because learning the answer moves attention
there too, only later and less. Way out 1: non-reentrant checkpointing. Way out 2: attach the loss to the attention
output, whose recomputation does have a graph.

    python examples/reentrant_gradient_loss.py
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS


class Attach(torch.autograd.Function):
    forward = staticmethod(lambda ctx, output, loss: output.view_as(output))
    backward = staticmethod(lambda ctx, grad: (grad, torch.ones_like(grad.flatten()[0])))


def attention(module, query, key, value, mask, found=None, place=None, attach=False, **kwargs):
    output, _ = FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    if found is not None and module.layer_idx == 0:
        weights = (query[:, :, -1:] @ key.mT * kwargs["scaling"]).softmax(-1).mean(1)[:, 0]
        found["loss"] = -weights.gather(1, place[:, None]).log().mean()
        output = Attach.apply(output, found["loss"]) if attach else output
    return output, None


def train(*, reentrant, attach=False, steps=120):
    """Attention loss of every step, and what it adds to the gradient at its layer's q projection."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.08}
    model = Qwen2ForCausalLM(Qwen2Config(attn_implementation="collecting", **sizes, **heads)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizer, log = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(steps):
        tokens, place = torch.randint(16, (64, 4)), torch.randint(4, (64, 1))
        ids, answer = torch.cat([tokens, 16 + place], 1), tokens.gather(1, place)[:, 0]
        gradients = []
        for found in (None, {}):  # the same step without and with the attention loss
            logits = model(ids, found=found, place=place[:, 0], attach=attach, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, -1], answer)
            optimizer.zero_grad()
            (loss if found is None or attach else loss + found["loss"]).backward()
            gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        optimizer.step()
        log.append((found["loss"].item(), (gradients[1] - gradients[0]).norm().item()))
    return log


AttentionInterface.register("collecting", attention)
AttentionMaskInterface.register("collecting", AttentionMaskInterface()["sdpa"])

if __name__ == "__main__":
    runs = {"reentrant": (True, False), "non-reentrant": (False, False), "reentrant, attached": (True, True)}
    for name, (reentrant, attach) in runs.items():
        print(f"\n{name}\n{'step':>8} {'attention loss':>15} {'its gradient':>13}")
        for step, (loss, gradient) in list(enumerate(train(reentrant=reentrant, attach=attach)))[::20]:
            print(f"{step:8} {loss:15.3f} {gradient:13.2e}")
