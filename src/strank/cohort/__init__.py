"""The data contract: one AnnData file a section, a cohort is a folder of them."""
