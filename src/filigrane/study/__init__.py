"""The experiment of the radioactivity literature at the scale of one machine, and its report.

    instruct   a marked model writes answers to instructions
    mixing     Bob's data set: some of them, and others
    grid       all of it over a grid of choices, with real models; every step leaves a file
    tiny       the same with transformers trained from nothing, in a minute
    selftest   the same with n-grams, in seconds
    documents  one test's result as a JSON document
    checked    such documents read back, and checked
    report     the page that people read; figures: its plots and those of a study

What trains and what reads are adapters; this package only puts them one after another.
"""
