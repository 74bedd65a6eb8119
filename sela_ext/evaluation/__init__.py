"""How good labels and features are: clustering metrics, nearest neighbours, linear probes."""
