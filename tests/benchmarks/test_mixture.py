"""The benchmark of a mixture of experts, on a small one."""

import json

import torch

from benchmarks.speed import experts, shapes

TINY = {
    **shapes.SHAPES["qwen3-30b-a3b"],
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
TINY |= {"head_dim": 10, "num_experts": 11, "num_experts_per_tok": 3, "moe_intermediate_size": 13}


@torch.inference_mode()
def test_bytes_are_those_of_the_experts_that_were_chosen(monkeypatch):
    """Counted by hand: attention, norms, router and head of a step, and each chosen expert once.
    The dense model has as many weights as a token's experts."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    mixture, dense = experts.pair("tiny", 2, torch.float32)
    one = experts.Steps(mixture, 4)
    one.take()
    read = one.read[-1]
    assert len(read) == 2
    assert all(3 <= n <= 11 for n in read)
    kept = [p.numel() for name, p in mixture.named_parameters() if "mlp.gate_up" not in name]
    kept = sum(kept) - mixture.embed_tokens.weight.numel() - 2 * 11 * 24 * 13
    assert one.bytes() == 4 * (kept + sum(read) * 3 * 24 * 13)
    alone = experts.Steps(mixture, 1)
    alone.take()
    assert alone.read[-1] == [3, 3]
    routers = 2 * 11 * 24 * 4
    assert experts.Steps(dense, 1).bytes() == alone.bytes() - routers


def test_the_command_prints_a_row_a_batch(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    path = tmp_path / "out.json"
    argv = ["--shape", "tiny", "--layers", "2", "--batch", "1", "5", "--steps", "3"]
    experts.main([*argv, "--dtype", "float32", "--json", str(path)])
    out = capsys.readouterr().out
    assert "experts read, of 11" in out
    rows = json.loads(path.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 5]
    assert rows[0]["experts"] == 3
    assert rows[1]["experts"] > 3
    assert all(row["mixture"]["seconds"] > 0 for row in rows)
