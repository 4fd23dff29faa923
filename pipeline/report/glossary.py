"""Terms of interpretability that a page may use, a sentence each; a page lists those that it uses.

A term is found by a pattern in the page's own text. Definitions of numbers are not here: each
metric brings its own (claims/scalars.py and the papers' metrics.py).
"""

import re
from collections.abc import Iterable

TERMS: dict[str, tuple[str, str]] = {  # term -> (pattern of what counts as its use, meaning)
    "activation patching": (
        r"activation patching|exact patching|denois\w+",
        "Running a model on one prompt with a part's output taken from another prompt, to see how "
        "much of the answer depends on that part.",
    ),
    "ablation": (
        r"ablat\w+",
        "Replacing a part's output by zero, by its mean, or by its output on other text.",
    ),
    "ACDC": (
        r"\bACDC\b",
        "Automatic circuit discovery: edges of the computation are cut one by one, and stay cut "
        "where the output hardly changes.",
    ),
    "arm": (
        r"\barms?\b",
        "One version of an experiment; here mostly a model and its variants, trained and not.",
    ),
    "attribution patching": (
        r"attribution patching|\bAtP",
        "Activation patching to first order: one gradient estimates the effect of every part.",
    ),
    "AuxK": (
        r"\bAuxK\b|auxiliary loss",
        "A second loss in which latents that have stopped firing reconstruct what is left over, "
        "so that they come back to life.",
    ),
    "circuit": (
        r"\bcircuits?\b",
        "The parts of a model, and the connections between them, that compute one behaviour.",
    ),
    "completeness": (
        r"completeness",
        "Whether the attributions of all parts add up to the effect of replacing all of them.",
    ),
    "dead latent": (
        r"dead (?:latents?|share)|(?:are|is|stay|fewer latents) dead",
        "A latent that has not fired on a given number of tokens.",
    ),
    "dictionary": (
        r"dictionar(?:y|ies)",
        "The directions that a sparse autoencoder has learned; also the autoencoder itself.",
    ),
    "EAP": (
        r"\bEAP\b",
        "Edge attribution patching: attribution patching for every edge between parts.",
    ),
    "explained variance": (
        r"explained[ _]variance|variance[ _]explained",
        "One minus the squared error of a reconstruction over the variance of what it "
        "reconstructs: 1 is perfect, 0 no better than the mean.",
    ),
    "faithfulness": (
        r"faithful\w*",
        "How much of a model's behaviour a circuit has by itself, all else being ablated.",
    ),
    "frozen decoder": (
        r"frozen decoder|random decoder",
        "A null arm of dictionaries: the directions are random and only the encoder is trained.",
    ),
    "grokking": (
        r"grok\w*",
        "Test accuracy that rises long after training accuracy is perfect.",
    ),
    "hook": (
        r"\bhooks?\b|blocks\.\d+\.",
        "A named place in a model whose activations can be read or replaced; names are "
        "TransformerLens's.",
    ),
    "in-context learning": (
        r"in-context learning|\bicl\b",
        "Predicting later tokens of a text better than earlier ones, out of the text itself.",
    ),
    "indirect object identification": (
        r"indirect object|\bIOI\b",
        "Completing “When Mary and John went to the shop, John gave a drink to” by “Mary”.",
    ),
    "induction head": (
        r"induction head",
        "An attention head that finds an earlier occurrence of the current token and copies what "
        "followed it.",
    ),
    "integrated gradients": (
        r"integrated gradients|\bIG\b|EAP-IG",
        "An attribution that averages the gradient along a path between two inputs.",
    ),
    "L0": (
        r"\bL0\b|\bl0\b",
        "The number of latents that are not zero on a token, on average.",
    ),
    "latent": (
        r"\blatents?\b",
        "One unit of a sparse autoencoder: a direction, and when it is active.",
    ),
    "logit": (
        r"\blogits?\b",
        "The model's score of a token before the softmax turns scores into probabilities.",
    ),
    "logit lens": (
        r"logit lens",
        "Reading a layer's stream as a prediction by the model's own last norm and unembedding.",
    ),
    "MCC": (
        r"\bMCC\b|\bmcc\b",
        "Mean cosine similarity of latents and true features under the best one-to-one matching.",
    ),
    "nat": (
        r"\bnats?\b",
        "Unit of loss with natural logarithms: 1 nat is 1.44 bits.",
    ),
    "null arm": (
        r"null arms?|null_arm",
        "A version in which a claim must not hold, such as an untrained model; where it holds "
        "there too, the claim says nothing.",
    ),
    "path patching": (
        r"path patching",
        "Activation patching of one connection: a part's output is replaced only where one later "
        "part reads it.",
    ),
    "perplexity": (r"perplexit\w+", "e to the power of the loss in nats a token."),
    "residual stream": (
        r"residual stream|\bstream\b|resid_(?:pre|mid|post)",
        "The vector at each position that every block of a transformer reads and adds to.",
    ),
    "seed": (
        r"\bseeds?\b",
        "The number that fixes every random draw; several seeds show the spread of a result.",
    ),
    "sparse autoencoder": (
        r"sparse autoencoders?|\bSAEs?\b",
        "A wide layer, of which few units are active, trained to reconstruct activations.",
    ),
    "splice": (
        r"splic\w+",
        "Putting a reconstruction in the place of the activations and running the model on.",
    ),
    "superposition": (
        r"superpos\w+",
        "Storing more features than there are dimensions, as directions that interfere a little.",
    ),
    "TopK": (
        r"\bTopK\b|\btopk\b",
        "An autoencoder that keeps the k most active latents of each token and no others.",
    ),
    "tuned lens": (
        r"tuned lens",
        "A logit lens with an affine map, trained for each layer, in front of it.",
    ),
    "unembedding": (
        r"unembed\w*|\bW_U\b",
        "The matrix that turns the last layer's stream into logits.",
    ),
    "weight decay": (
        r"weight decay",
        "Shrinking all weights a little at every step of training.",
    ),
}


def used(texts: Iterable[str]) -> list[tuple[str, str]]:
    """(term, meaning) of the terms that stand in some text, in alphabetical order."""
    text = "\n".join(texts)
    found = [(t, m) for t, (pattern, m) in TERMS.items() if re.search(pattern, text, re.I)]
    return sorted(found, key=lambda pair: pair[0].lower())
