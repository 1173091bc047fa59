"""The experiment of the radioactivity literature at the scale of one machine, step by step.

    instruct   a marked model writes answers to instructions
    mixing     Bob's data set: some of them, and others
    report     what came out, for people

What trains and what reads are adapters; this package only puts them one after another.
"""
