"""The recipe for lm-eval: its HFLM scores whole sequences, and with sparsify="all" every token of them is sparsified."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import larosa_fx
from larosa_fx.method.reference import keep_top_k, mapped
from tiny import batches, llama

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [{"question": "ABCDE", "choices": ["FGH", "XYZAB"], "answer": 0},
             {"question": "ZYX", "choices": ["WV", "ABC"], "answer": 0},
             {"question": "HELLOWORLD", "choices": ["AGAIN", "S"], "answer": 1}]


def letters():
    """A tokenizer of 64 single characters that adds spaces to nothing."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({chr(32 + i): i for i in range(64)}, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token="!")


@pytest.fixture
def score(tmp_path, monkeypatch):
    """score(model): the log-likelihoods of all choices, as lm-eval finds them in a task of two local files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "letters.yaml").write_text(TASK.format(data=data))

    def run(model):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=letters(), batch_size=2), tasks=["letters"], log_samples=True,
            bootstrap_iters=0, task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
        assert found["results"]["letters"]["alias"] == "letters"
        samples = sorted(found["samples"]["letters"], key=lambda sample: sample["doc_id"])
        return torch.tensor([float(choice[0][0]) for sample in samples for choice in sample["resps"]])

    return run


def test_every_token_is_sparsified(score, tmp_path):
    model = llama()
    plan = larosa_fx.calibrate(model, batches(), progress=False)
    dense = copy.deepcopy(model)
    expected = score(dense)
    with mapped(dense, plan, lambda site, z: keep_top_k(z, plan.k[site.name])):
        simulated = score(dense)
    assert (simulated - expected).abs().min() > 1e-2  # of each choice: the prompt's own tokens count, too

    larosa_fx.pack(model, plan, tmp_path / "pack", compiler="eager")
    for one in (larosa_fx.enable(model, compiler="eager", sparsify="all"),
                larosa_fx.load(tmp_path / "pack", compiler="eager", sparsify="all")):
        torch.testing.assert_close(score(one), simulated, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score(larosa_fx.enable(model, compiler="eager")), expected, rtol=1e-3, atol=1e-3)


def test_weights_that_are_kept_are_sparsified_as_well(score):
    model = llama()
    plan = larosa_fx.calibrate(model, batches(), progress=False)
    dense = score(model)
    sparse = score(larosa_fx.enable(model, plan, compiler="eager", weights="copy", sparsify="all"))
    assert (sparse - dense).abs().min() > 1e-2
    assert torch.equal(score(larosa_fx.disable(model)), dense)
