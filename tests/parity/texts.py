"""Twelve texts of different kinds, written for the parity figures: about 80 tokens each."""

TEXTS = {
    "geography": (
        "The river rises in a small lake high in the mountains and runs north for about two hundred"
        " miles before it reaches the sea. For most of that way it is narrow and fast, with deep"
        " pools under the cliffs where trout and salmon gather in the autumn. Near the coast it"
        " slows down, spreads over the plain and divides into several branches, and the largest"
        " town of the region stands on the widest of them."
    ),
    "dialogue": (
        '"You are late again," said Martha, without looking up from her newspaper. "The train'
        ' stopped for an hour outside the station," Tom answered, hanging his wet coat behind the'
        ' door. "It always does when it rains." She folded the paper, put it down next to the'
        ' teapot and smiled at him. "Then you must be hungry. There is soup on the stove, and'
        ' some bread left from this morning."'
    ),
    "python": (
        "def moving_average(values, width):\n"
        '    """Return the mean of each window of the given width."""\n'
        "    if width < 1 or width > len(values):\n"
        '        raise ValueError("width must be between 1 and the number of values")\n'
        "    total = sum(values[:width])\n"
        "    means = [total / width]\n"
        "    for i in range(width, len(values)):\n"
        "        total += values[i] - values[i - width]\n"
        "        means.append(total / width)\n"
        "    return means\n"
    ),
    "recipe": (
        "Heat the oven to 180 degrees. Mix 250 grams of flour with a teaspoon of baking powder and"
        " a pinch of salt. In another bowl, beat three eggs with 150 grams of sugar until the"
        " mixture is pale, then stir in the melted butter and the juice of one lemon. Fold in the"
        " flour, pour the batter into a greased tin and bake for 35 minutes. Let the cake cool"
        " before you cut it into slices."
    ),
    "news": (
        "The city council voted on Tuesday to close the old bridge to cars from the first of March."
        " Engineers had warned last year that its steel supports were badly corroded and would not"
        " carry heavy traffic for much longer. Buses will take a longer route through the harbour"
        " district, and shop owners fear that they will lose customers. The mayor said that repairs"
        " could cost up to 40 million dollars."
    ),
    "arithmetic": (
        "Question: A farmer has 12 rows of apple trees with 15 trees in each row. Every tree gives"
        " 20 kilograms of apples, and he sells them for 2 dollars a kilogram. How much money does"
        " he make?\n"
        "Answer: There are 12 * 15 = 180 trees. Together they give 180 * 20 = 3600 kilograms of"
        " apples. At 2 dollars a kilogram this makes 3600 * 2 = 7200 dollars. The answer is 7200."
    ),
    "biology": (
        "Photosynthesis takes place in the chloroplasts of plant cells. In the first stage, light"
        " is absorbed by chlorophyll, water molecules are split, and oxygen is released into the"
        " air. The energy is stored for a short time in two carrier molecules, ATP and NADPH. In"
        " the second stage, which does not need light, the cell uses this energy to turn carbon"
        " dioxide into sugars. Temperature and the amount of light limit how fast it goes."
    ),
    "letter": (
        "Dear Ms. Alvarez,\n\nThank you for your letter of 14 May about the position of librarian"
        " at our school. We were impressed by your experience and would like to invite you to an"
        " interview on Thursday, 6 June, at 10 a.m. Please bring two references and a copy of your"
        " diploma. If you are unable to come on that day, let us know by the end of the month, and"
        " we will find another time.\n\nYours sincerely,\nHelen Brook"
    ),
    "french": (
        "Le petit village se trouve au bord de la mer, entre deux collines couvertes de pins. En"
        " hiver, il n'y a presque personne dans les rues, et les pêcheurs réparent leurs filets"
        " devant le port. Mais dès le mois de juin, les familles arrivent de la ville, les hôtels"
        " ouvrent leurs portes et les enfants courent sur la plage."
    ),
    "chat": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhy is the"
        " sky blue? Please answer in two sentences.<|im_end|>\n<|im_start|>assistant\nThe sky looks"
        " blue because the molecules of the air scatter blue light, which has a short wavelength,"
        " more strongly than red light. This scattered light reaches our eyes from every direction,"
        " so the whole sky appears to be blue.<|im_end|>\n"
    ),
    "history": (
        "The printing press changed the way in which knowledge spread through Europe. Before the"
        " middle of the fifteenth century, books were copied by hand, and a single volume could"
        " take a scribe several months to finish. By 1500, more than twenty million volumes had"
        " been printed, and prices had fallen so far that students and merchants could buy them."
        " New ideas in religion, science and politics now crossed borders within weeks."
    ),
    "table": (
        '{"orders": [\n'
        '  {"id": 1041, "customer": "Nora Lind", "items": ["desk lamp", "notebook"], "paid": true,'
        ' "total": 48.50},\n'
        '  {"id": 1042, "customer": "Sam Okafor", "items": ["office chair"], "paid": false,'
        ' "total": 129.00},\n'
        '  {"id": 1043, "customer": "Li Wei", "items": ["notebook", "pens"], "paid": true,'
        ' "total": 12.75}\n'
        "]}\n"
    ),
}

SHORT = ("geography", "python", "chat")
"""Those whose first SHORT_LEN tokens have their logits in the goldens."""

SHORT_LEN = 40
