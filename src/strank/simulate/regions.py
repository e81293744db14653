"""What simulated tissue is made of: regions by name, and their numbers in maps."""

REGIONS = ("tumour", "stroma", "gland", "immune", "adipose")
TUMOUR, STROMA, GLAND, IMMUNE, ADIPOSE = range(5)
GLASS = -1
