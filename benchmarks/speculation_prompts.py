"""What the benchmark of speculation asks for: answers that repeat their prompt, and ones that do
not."""

_CAVES = (
    "Limestone caves form where rain takes up carbon dioxide from the soil and becomes a weak"
    " acid. Over thousands of years the water widens cracks in the rock until they are passages"
    " large enough to walk through. Where it drips from a ceiling it leaves a little calcite"
    " behind, and a stalactite grows downwards by about a tenth of a millimetre a year. Below it a"
    " stalagmite grows upwards, and where the two meet they become a column."
)
_HARBOUR = (
    "The harbour of Varde opened in 1862 with two quays and a single crane. In 1891 a railway line"
    " reached the eastern quay, and within ten years the trade in timber had doubled. The western"
    " quay was rebuilt in 1934 after a storm had broken its wall, and since 1970 it has belonged to"
    " the fishing boats alone. Today the eastern quay is a park, and the crane is a monument."
)
_BREAD = (
    "Mix 500 grams of flour with 350 grams of water and 10 grams of salt. Add 2 grams of yeast and"
    " knead the dough for ten minutes. Cover the bowl and let the dough rest for two hours. Shape"
    " the dough into a loaf, put it on a floured tray and let it rest for another hour. Bake the"
    " loaf at 240 degrees for fifteen minutes, then at 200 degrees for thirty minutes."
)
_CODE = """\
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        return self.balance
"""
_TABLE = """\
id,city,country,population,area
1,Aarhus,Denmark,285273,91
2,Bergen,Norway,289330,465
3,Gothenburg,Sweden,596841,450
4,Tampere,Finland,249009,690
5,Tartu,Estonia,97759,39
6,Kaunas,Lithuania,304198,157
"""

REPETITIVE = (
    f"Repeat this text word for word:\n\n{_CAVES}",
    f"Add a method `close` to this Python class, and return the whole class:\n\n{_CODE}",
    f"Correct the spelling in this text, and return all of it:\n\n{_HARBOUR}",
    f"Rename `amount` to `value` in this Python code, and return all of it:\n\n{_CODE}",
    f"Write this recipe as a numbered list, with the same sentences:\n\n{_BREAD}",
    f"Return this table with one more row for Oslo:\n\n{_TABLE}",
    f"Summarise this text with quotes from it:\n\n{_HARBOUR}",
    f"Return this text with each sentence on a line of its own:\n\n{_CAVES}",
)

FREE = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how a bicycle stays upright.",
    "What should I look at when I buy a used car?",
    "Describe a market in the morning.",
    "Why do leaves change their colour in autumn?",
    "Tell me about the history of glass.",
    "How would you teach a child to swim?",
    "Write a letter to a friend who has moved to another country.",
)
