"""A few minutes that a job spends on its own nodes before it trains: `megadiff doctor --cluster`.

meeting.py   who is there: ranks find each other through a key-value store, and whoever is missing has a name
facts.py     what is installed on a node
measure.py   what a rank computes, sends and writes in a second
judge.py     what differs from the rest, in sentences
check.py     the order of it all
"""
