"""Mixtures of linear regressions whose clients fall into clusters: data, federated EM, BR-IFCA. Pure: no Flower."""
