"""Rows to tune real models on, made without a network: short facts and longer prose, from tables of real knowledge."""

from __future__ import annotations

import random

Row = list[dict[str, str]]

# country, capital, continent, currency, language
COUNTRIES = """
Albania|Tirana|Europe|lek|Albanian
Algeria|Algiers|Africa|Algerian dinar|Arabic
Argentina|Buenos Aires|South America|Argentine peso|Spanish
Armenia|Yerevan|Asia|dram|Armenian
Australia|Canberra|Oceania|Australian dollar|English
Austria|Vienna|Europe|euro|German
Bangladesh|Dhaka|Asia|taka|Bengali
Belgium|Brussels|Europe|euro|Dutch
Bolivia|Sucre|South America|boliviano|Spanish
Brazil|Brasília|South America|real|Portuguese
Bulgaria|Sofia|Europe|euro|Bulgarian
Cambodia|Phnom Penh|Asia|riel|Khmer
Canada|Ottawa|North America|Canadian dollar|English
Chile|Santiago|South America|Chilean peso|Spanish
China|Beijing|Asia|yuan|Mandarin Chinese
Colombia|Bogotá|South America|Colombian peso|Spanish
Croatia|Zagreb|Europe|euro|Croatian
Cuba|Havana|North America|Cuban peso|Spanish
Cyprus|Nicosia|Asia|euro|Greek
Denmark|Copenhagen|Europe|Danish krone|Danish
Ecuador|Quito|South America|US dollar|Spanish
Egypt|Cairo|Africa|Egyptian pound|Arabic
Estonia|Tallinn|Europe|euro|Estonian
Ethiopia|Addis Ababa|Africa|birr|Amharic
Fiji|Suva|Oceania|Fijian dollar|Fijian
Finland|Helsinki|Europe|euro|Finnish
France|Paris|Europe|euro|French
Georgia|Tbilisi|Asia|lari|Georgian
Germany|Berlin|Europe|euro|German
Ghana|Accra|Africa|cedi|English
Greece|Athens|Europe|euro|Greek
Hungary|Budapest|Europe|forint|Hungarian
Iceland|Reykjavik|Europe|Icelandic króna|Icelandic
India|New Delhi|Asia|Indian rupee|Hindi
Indonesia|Jakarta|Asia|rupiah|Indonesian
Iran|Tehran|Asia|rial|Persian
Iraq|Baghdad|Asia|Iraqi dinar|Arabic
Ireland|Dublin|Europe|euro|English
Israel|Jerusalem|Asia|new shekel|Hebrew
Italy|Rome|Europe|euro|Italian
Jamaica|Kingston|North America|Jamaican dollar|English
Japan|Tokyo|Asia|yen|Japanese
Jordan|Amman|Asia|Jordanian dinar|Arabic
Kazakhstan|Astana|Asia|tenge|Kazakh
Kenya|Nairobi|Africa|Kenyan shilling|Swahili
Laos|Vientiane|Asia|kip|Lao
Latvia|Riga|Europe|euro|Latvian
Lebanon|Beirut|Asia|Lebanese pound|Arabic
Lithuania|Vilnius|Europe|euro|Lithuanian
Madagascar|Antananarivo|Africa|ariary|Malagasy
Malaysia|Kuala Lumpur|Asia|ringgit|Malay
Malta|Valletta|Europe|euro|Maltese
Mexico|Mexico City|North America|Mexican peso|Spanish
Mongolia|Ulaanbaatar|Asia|tögrög|Mongolian
Morocco|Rabat|Africa|Moroccan dirham|Arabic
Mozambique|Maputo|Africa|metical|Portuguese
Nepal|Kathmandu|Asia|Nepalese rupee|Nepali
New Zealand|Wellington|Oceania|New Zealand dollar|English
Nigeria|Abuja|Africa|naira|English
Norway|Oslo|Europe|Norwegian krone|Norwegian
Pakistan|Islamabad|Asia|Pakistani rupee|Urdu
Paraguay|Asunción|South America|guaraní|Spanish
Peru|Lima|South America|sol|Spanish
Poland|Warsaw|Europe|złoty|Polish
Portugal|Lisbon|Europe|euro|Portuguese
Qatar|Doha|Asia|Qatari riyal|Arabic
Romania|Bucharest|Europe|leu|Romanian
Rwanda|Kigali|Africa|Rwandan franc|Kinyarwanda
Senegal|Dakar|Africa|CFA franc|French
Serbia|Belgrade|Europe|Serbian dinar|Serbian
Slovakia|Bratislava|Europe|euro|Slovak
Slovenia|Ljubljana|Europe|euro|Slovene
Spain|Madrid|Europe|euro|Spanish
Sweden|Stockholm|Europe|Swedish krona|Swedish
Switzerland|Bern|Europe|Swiss franc|German
Thailand|Bangkok|Asia|baht|Thai
Tunisia|Tunis|Africa|Tunisian dinar|Arabic
Turkey|Ankara|Asia|Turkish lira|Turkish
Uganda|Kampala|Africa|Ugandan shilling|English
Ukraine|Kyiv|Europe|hryvnia|Ukrainian
Uruguay|Montevideo|South America|Uruguayan peso|Spanish
Vietnam|Hanoi|Asia|dong|Vietnamese
Zambia|Lusaka|Africa|kwacha|English
""".strip().splitlines()

# name, symbol, atomic number, kind
ELEMENTS = """
hydrogen|H|1|gas
helium|He|2|noble gas
lithium|Li|3|metal
beryllium|Be|4|metal
boron|B|5|metalloid
carbon|C|6|nonmetal
nitrogen|N|7|gas
oxygen|O|8|gas
fluorine|F|9|halogen
neon|Ne|10|noble gas
sodium|Na|11|metal
magnesium|Mg|12|metal
aluminium|Al|13|metal
silicon|Si|14|metalloid
phosphorus|P|15|nonmetal
sulfur|S|16|nonmetal
chlorine|Cl|17|halogen
argon|Ar|18|noble gas
potassium|K|19|metal
calcium|Ca|20|metal
titanium|Ti|22|metal
chromium|Cr|24|metal
manganese|Mn|25|metal
iron|Fe|26|metal
cobalt|Co|27|metal
nickel|Ni|28|metal
copper|Cu|29|metal
zinc|Zn|30|metal
arsenic|As|33|metalloid
selenium|Se|34|nonmetal
bromine|Br|35|halogen
krypton|Kr|36|noble gas
silver|Ag|47|metal
tin|Sn|50|metal
iodine|I|53|halogen
xenon|Xe|54|noble gas
barium|Ba|56|metal
tungsten|W|74|metal
platinum|Pt|78|metal
gold|Au|79|metal
mercury|Hg|80|metal
lead|Pb|82|metal
radon|Rn|86|noble gas
radium|Ra|88|metal
uranium|U|92|metal
""".strip().splitlines()

# large unit (several, one), small unit, how many of the small ones are one large one
UNITS = [
    ("metres", "metre", "centimetres", 100),
    ("kilometres", "kilometre", "metres", 1000),
    ("kilograms", "kilogram", "grams", 1000),
    ("tonnes", "tonne", "kilograms", 1000),
    ("hours", "hour", "minutes", 60),
    ("minutes", "minute", "seconds", 60),
    ("days", "day", "hours", 24),
    ("weeks", "week", "days", 7),
    ("litres", "litre", "millilitres", 1000),
    ("feet", "foot", "inches", 12),
    ("yards", "yard", "feet", 3),
    ("pounds", "pound", "ounces", 16),
    ("dozens", "dozen", "pieces", 12),
    ("gallons", "gallon", "quarts", 4),
    ("decades", "decade", "years", 10),
]
AMOUNTS = (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 20, 25)


def facts() -> list[Row]:
    """Return short questions about countries, elements and units, with answers of one sentence."""
    rows = []
    for country, capital, continent, currency, _ in (line.split("|") for line in COUNTRIES):
        rows += [
            row(f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
            row(f"{capital} is the capital of which country?", f"{capital} is the capital of {country}."),
            row(f"Which currency is used in {country}?", f"People in {country} pay with the {currency}."),
            row(f"On which continent is {country}?", f"{country} is in {continent}."),
        ]
    for name, symbol, number, kind in (line.split("|") for line in ELEMENTS):
        rows += [
            row(f"What is the chemical symbol of {name}?", f"The symbol of {name} is {symbol}."),
            row(f"Which element has the atomic number {number}?", f"Element {number} is {name}, a {kind}."),
        ]
    for many, one, small, factor in UNITS:
        rows += [
            row(
                f"How many {small} are {amount} {many}?",
                f"{amount} {many} are {amount * factor} {small}, because one {one} has {factor}.",
            )
            for amount in AMOUNTS[:10]
        ]
    return shuffled(rows)


def prose() -> list[Row]:
    """Return questions whose answers are two or three sentences, 30 to 80 tokens."""
    rows = []
    for country, capital, continent, currency, language in (line.split("|") for line in COUNTRIES):
        about = (
            f"{country} is a country in {continent}, and its capital is {capital}. People there pay with the "
            f"{currency}. Before a visit, learn a few words of {language}, which is widely spoken in the country."
        )
        trip = (
            f"Most journeys to {country} begin in {capital}, its capital. Change some money into the {currency} when "
            f"you arrive, and greet people in {language}: they will be pleased, and answer more slowly."
        )
        rows += [row(f"Tell me about {country}.", about), row(f"How do I prepare for a trip to {country}?", trip)]
    for name, symbol, number, kind in (line.split("|") for line in ELEMENTS):
        atoms = (
            f"{name.capitalize()} is a {kind} with the symbol {symbol} and the atomic number {number}. Each of its "
            f"atoms has {number} protons in the nucleus and, when it is neutral, just as many electrons around it."
        )
        rows.append(row(f"What should I know about {name}?", atoms))
    for many, one, small, factor in UNITS:
        rows += [
            row(
                f"How do I convert {amount} {many} to {small}?",
                f"To convert {many} to {small}, multiply by {factor}, because one {one} has {factor} {small}. So "
                f"{amount} {many} are {amount * factor} {small}. For the way back, divide by {factor} instead.",
            )
            for amount in AMOUNTS
        ]
    return shuffled(rows)


def row(question: str, answer: str) -> Row:
    """Return a conversation of one turn each."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def shuffled(rows: list[Row]) -> list[Row]:
    """Return the rows in a random order, always the same."""
    random.Random(1).shuffle(rows)
    return rows
