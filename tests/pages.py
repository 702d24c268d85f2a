"""Documents and web pages of random English words, which no filter drops."""

import random

WORDS = (
    "the of and to in that with have be a river mountain house tree walks slowly every morning people water light time "
    "year hand part place week company system program question work government number night point home story fact "
    "month book eye word business issue side kind head service friend father power hour game line end member law car "
    "city community name president team minute idea body information back parent face others level office door health "
    "person art war history party result change reason research girl guy moment air teacher force education"
).split()


def words_of(rng, n):
    return [rng.choice(WORDS) for _ in range(n)]


def document(name, n_sentences=12):
    """A document of sentences that every filter keeps; its name is its first word."""
    rng = random.Random(name)
    sentences = [" ".join(words_of(rng, rng.randint(9, 14))).capitalize() + "." for _ in range(n_sentences)]
    return f"{name} {sentences[0]}\n" + "\n".join(sentences[1:])


PAGE = """<html><head><title>{name}</title><script>var x = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav><article><h1>{name}</h1>{paragraphs}</article>
<footer>Copyright 2020. All rights reserved.</footer></body></html>"""


def page(name):
    sentences = document(name).split("\n")
    paragraphs = "".join(f"<p>{' '.join(sentences[i : i + 4])}</p>" for i in range(0, len(sentences), 4))
    return PAGE.format(name=name, paragraphs=paragraphs)
