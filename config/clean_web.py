# Web pages to clean English text, after FineWeb (Penedo et al. 2024): WARC and WET files of Common Crawl, HTML files, or
# .jsonl, .parquet and .txt files of text.
#
#   python clean.py config/clean_web.py                                   # crawl/ to data/web/text; look at data/web/dropped
#   python prepare.py --input=data/web/text --data_dir=data/web/tokens
#   python train.py config/gpt2_124m.py --data_dir=data/web/tokens
#
# Steps that need a setting of their own, and where they belong:
#   blocklist      after language; --blocklist=FILE
#   perplexity     before exact; --perplexity_run=FOLDER, a model trained on text as it should be
#   lines          last, since near duplicates without their common lines would no longer be recognised
#   decontaminate  last; --eval_texts=FILES

input = "crawl"
clean_dir = "data/web"
steps = ("html", "fix", "language", "length", "gopher_repetition", "gopher", "c4", "fineweb", "pii", "exact", "near")

language = "en"
language_threshold = 0.65
min_chars = 200
min_words = 50
min_sentences = 3
c4_line_ends = False
min_line_ends = 0.12
near_bands = 14  # with 8 rows: 92 % of the pairs at a similarity of 0.8 are found, 5 % of those at 0.5
near_rows = 8
