"""An engine without a model, for tests of what stands around engines: text depends on the seed and nothing else.

Run as a program, it evaluates a recipe with itself as the engine: `python stub_engine.py RECIPE PAUSE DRAWN_LOG`.
"""

import random
import sys
import time
from pathlib import Path

from afterglow.core.checkpoint import read_checkpoint
from afterglow.core.generation import Completion, Engine


class StubEngine(Engine):
    """Answers with a number near 4, sometimes truncated, sometimes without a box; completions come shuffled."""

    def __init__(self, config, pause=0.0, drawn=None):
        self.tokenizer, self.max_context = read_checkpoint(config.model).tokenizer, 1000
        self.pause, self.drawn = pause, drawn
        self.closed = False

    def generate(self, requests):
        order = sorted(requests, key=lambda request: request.seed % 1009)
        for request in order:
            time.sleep(self.pause)
            if self.drawn:
                with open(self.drawn, "a") as log:
                    log.write(request.key + "\n")
            rng = random.Random(request.seed)
            answer = rng.choice(["4", "4.0", r"\frac{8}{2}", "5", "7", None])
            text = f"Let me think about {rng.random():.3f}. " + (f"So \\boxed{{{answer}}}." if answer else "I give up.")
            tokens = [rng.randrange(9, 260) for _ in range(rng.randrange(3, 40))]
            finish = "length" if rng.random() < 0.2 else "stop"
            yield Completion(request.key, tokens, text, finish, [-0.5] * len(tokens) if request.logprobs else None)

    def load_weights(self, model):
        raise AssertionError("not used")

    def close(self):
        self.closed = True


if __name__ == "__main__":
    from afterglow.core.recipe import read_recipe
    from afterglow.eval import evaluate

    recipe, pause, drawn = sys.argv[1:]
    evaluate.open_engine = lambda config: StubEngine(config, float(pause), Path(drawn))
    evaluate.run(read_recipe(recipe))
