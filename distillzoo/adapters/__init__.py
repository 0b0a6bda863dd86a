"""Parts that methods put beside or into a network: connectors, projections, denoisers, memory banks, branches, second widths."""
