"""Attention of single words over the video, per layer and head, from the rows of text tokens alone.

`RowMaps` travels through a forward call in place of a `Capture` (`attention.py`) and computes, for every text token
behind the clip, the softmax over all keys that it sees: what eager attention has in that row. Each head is reduced to
words as soon as it is there, so beyond what is kept the memory is that of one head's rows in one layer, R x L in fp32
for R text rows and L tokens, however many layers the model has.

Planes kept of every word in every layer, V values each:
    0          mean over heads of the attention within each temporal step, which is renormalised to a sum of 1: the map
               that supervision in frame scope trains (SWIM, arXiv 2605.18018, Eq. 5)
    1          mean over heads of the attention itself; its sum is the share of the word's attention on the video
    2, 3, ...  the attention itself of each chosen head
A word of several tokens has the mean of their maps. The entry behind the last word is the *shared* map: for each head
and key the median over all text rows (of an even number the lower one in the middle), that is where tokens look
whatever they mean; its plane 0 is the mean over heads of that median, renormalised within each step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RowMaps:
    """Collects the planes of the words of one unpadded sequence; make a new one for each forward call."""

    layout: Any = None  # one plain sequence, held by one rank: what `attention.py` asks a Capture for
    group: Any = None

    def __init__(
        self,
        rows: Sequence[int],
        words: Sequence[Sequence[int]],
        keys: Sequence[int],
        *,
        steps: int,
        layers: Sequence[int],
        heads: Sequence[int],
    ) -> None:
        """`rows`: columns of all text tokens; `words`: the columns of each word's tokens, which are among them; `keys`:
        columns of the clip's V visual tokens, those of each of its `steps` one after the other."""
        place = {column: number for number, column in enumerate(rows)}
        self.rows, self.keys = torch.tensor(rows), torch.tensor(keys)
        self.words = [torch.tensor([place[column] for column in columns]) for columns in words]
        self.steps, self.layers, self.heads = steps, tuple(layers), tuple(heads)
        self._maps: dict[int, Tensor] = {}

    @torch.no_grad()
    def observe(self, layer: int, q_BHLD: Tensor, k_BKLD: Tensor, scale: float, *, num_kv_heads: int) -> None:  # noqa: ARG002
        """Compute the planes of `layer`."""
        num_heads, num_keys = q_BHLD.shape[1], len(self.keys)
        planes = torch.zeros(len(self.words) + 1, 2 + len(self.heads), num_keys)
        rows, keys = self.rows.to(q_BHLD.device), self.keys.to(q_BHLD.device)
        unseen_RL = torch.arange(k_BKLD.shape[2], device=rows.device) > rows[:, None]
        for head in range(num_heads):
            q_RD, k_LD = q_BHLD[0, head, rows].float(), k_BKLD[0, head * k_BKLD.shape[1] // num_heads].float()
            weights_RL = (q_RD @ k_LD.T * scale).masked_fill_(unseen_RL, -torch.inf).softmax(-1)
            own_RV = weights_RL[:, keys].cpu()
            del weights_RL
            shared_V = own_RV.median(0).values
            within_RV = self._within_steps(own_RV)
            for number, places in enumerate(self.words):
                planes[number, 0] += within_RV[places].mean(0) / num_heads
                planes[number, 1] += own_RV[places].mean(0) / num_heads
            planes[-1, 0] += self._within_steps(shared_V) / num_heads
            planes[-1, 1] += shared_V / num_heads
            if head in self.heads:
                plane = 2 + self.heads.index(head)
                planes[:, plane] = torch.stack([*(own_RV[places].mean(0) for places in self.words), shared_V])
        self._maps[layer] = planes

    def _within_steps(self, maps: Tensor) -> Tensor:
        by_step = maps.unflatten(-1, (self.steps, -1))
        # A step without any attention, which fp32 allows, stays one.
        return (by_step / by_step.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).flatten(-2)

    def maps(self) -> dict[int, Tensor]:
        """Planes fp32 (W + 1, 2 + heads, V) by layer, after the forward; RuntimeError when a layer is missing."""
        if missing := [layer for layer in self.layers if layer not in self._maps]:
            raise RuntimeError(f"no attention came from layers {missing}; call register_capture(model) first")
        return self._maps
