"""The studies of federated EM and of BR-IFCA on regression data."""
