"""The Transformers callback in the trainer of Sentence Transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")  # which that trainer needs

from datasets import Dataset
from datasets.table import InMemoryTable
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from mixture_torch import read_extra
from mixture_torch.integrations.transformers import MixtureCallback

WORDS = [f"w{n}" for n in range(60)]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(folder)
    return folder


def train(bert: Path, folder: Path, *callbacks: Any) -> SentenceTransformer:
    transformer = Transformer(str(bert))
    model = SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")
    texts = [f"{WORDS[n % 60]} {WORDS[7 * n % 60]}" for n in range(64)]
    columns = {"anchor": texts, "positive": [f"{text} w1 w2" for text in texts]}
    pairs = Dataset(InMemoryTable.from_pydict(columns), fingerprint="pairs")
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=16, max_steps=4, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, pairs, loss=loss, callbacks=list(callbacks)).train()
    return model


def test_pairs_of_sentences_are_two_views(bert: Path, tmp_path: Path) -> None:
    callback = MixtureCallback("", K=3, output="sentence_embedding", views=2, forwards=2)
    model, without = train(bert, tmp_path / "a", callback), train(bert, tmp_path / "b")
    extra = read_extra(tmp_path / "a")
    assert extra["n_rows"].tolist() == [32] * 4
    assert (extra["alignment"] > 0).all()
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), without.parameters(), strict=True)]
    assert all(same)
