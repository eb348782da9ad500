"""Data: tables and arrays read with a schema, partitions of examples into clients, generators, and the catalogue."""
