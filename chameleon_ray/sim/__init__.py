"""A discrete-event simulator of replicas and clusters that runs the product's own policies."""
