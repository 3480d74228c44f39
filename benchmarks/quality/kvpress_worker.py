"""kvpress as a reader of given texts, in an interpreter that has it. kvpress.py asks.

What it needs is imported late: that interpreter need not have this package.
"""

from benchmarks.speed.peers import KVPress


class Reading(KVPress):
    """transformers reads token by token while a DecodingPress with SnapKV's scores prunes."""

    def read(
        self, ids: list[int], prompt: int, budget: int | None, interval: int, window: int
    ) -> dict:
        """Figures of every token behind the prompt but the last, which is predicted alone; and
        `rounds`: tokens seen and tokens held, behind the prompt and each `interval` tokens later.

        budget: tokens to keep; None reads with the full cache.
        """
        import torch

        tokens = torch.tensor([ids], device=self.model.device)
        counted = len(ids) - 1 - prompt
        out = self.model(tokens[:, :-1], logits_to_keep=counted)
        full = mine = out.logits[0].log_softmax(-1)  # (counted, vocab)
        rounds = [(seen, seen) for seen in range(prompt, len(ids), interval)]
        if budget is not None:
            press = self.kvpress.DecodingPress(
                base_press=self.kvpress.SnapKVPress(window_size=window),
                compression_interval=interval,
                target_size=budget,
                hidden_states_buffer_size=interval,  # it scores with no older ones
            )
            mine, rounds = self.decode(tokens, prompt, press, interval)
        right = tokens[0, prompt + 1 :, None]
        return {
            "nats": (-mine.gather(-1, right)[:, 0]).tolist(),
            "kl": (full.exp() * (full - mine)).sum(-1).tolist(),
            "agree": (full.argmax(-1) == mine.argmax(-1)).float().tolist(),
            "rounds": rounds,
        }

    def decode(self, tokens, prompt: int, press, interval: int) -> tuple:
        """-> log-probabilities (T, vocab) behind each token after the prompt, and rounds."""
        import torch
        from transformers import DynamicCache

        self.cache, rows = DynamicCache(), []
        self.model(tokens[:, :prompt], **self.caching(), logits_to_keep=1)
        rounds = [(prompt, self.held()["tokens"])]
        with press(self.model):
            for place in range(prompt, tokens.shape[1] - 1):
                # A pruned cache is shorter than the text, so the position has to be given.
                options = self.caching() | {"position_ids": tokens.new_tensor([[place]])}
                logits = self.model(tokens[:, place : place + 1], **options).logits[:, -1]
                rows.append(logits.log_softmax(-1))
                if (place + 1 - prompt) % interval == 0:
                    rounds.append((place + 1, self.held()["tokens"]))
        return torch.cat(rows), rounds
