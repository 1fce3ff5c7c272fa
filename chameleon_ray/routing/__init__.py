"""Which replica serves a request: pure decisions, for the router and the simulated cluster.

``replica_load.py``: what a replica tells of its load. ``replica_table.py``: what a router believes of all replicas.
``ranking.py``: the replicas for one request, best first.
"""
